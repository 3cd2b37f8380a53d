"""Tables for notebooks, and the summary of a quantization as rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from nybble.quantization import report_page

if TYPE_CHECKING:
    from nybble.quantization.report_data import ReportData


def html_table(rows: Mapping[str, str]) -> str:
    """Returns a table of two columns. Names and values are escaped."""
    cells = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th><td style="text-align: left">{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def report_rows(done: ReportData) -> dict[str, str]:
    """Returns the summary of a quantization: names and values."""
    rows = {
        "file": f"{done.out}, {report_page.size(done.size_bytes)}",
        "recipe": done.recipe,
        "linear layers": f"{done.bits_per_weight:.2f} bits per weight, scales included",
        "matrices": ", ".join(report_page.matrices(done)),
    }
    if done.sparsity > 0.25:
        rows["zeros"] = f"{report_page.percent(done.sparsity)} of the weights of linear layers"
    if (chosen := done.chosen) is not None:
        rows["perplexity"] = report_page.number(chosen.perplexity, 4) + (
            f" (source: {report_page.number(done.reference_perplexity, 4)})" if done.reference_perplexity else ""
        )
        rows["divergence"] = (
            f"mean KL {report_page.number(chosen.kl_mean)}, median {report_page.number(chosen.kl_median)}"
        )
        rows["same top token"] = report_page.percent(chosen.top_agreement)
    for score in done.tasks:
        rows[f"{score.task}, {score.metric}"] = (
            f"{report_page.score(score.value, score.error)} (source: "
            f"{report_page.score(score.source, score.source_error)})"
        )
    if (pruning := done.pruning) is not None:
        rows["experts left out"] = (
            f"{pruning.before - pruning.after} of {pruning.before} per layer, which tokens chose "
            f"{report_page.percent(pruning.left_out)} of the time; mean KL {report_page.number(pruning.kl_mean)}"
        )
    if done.experts_rounded:
        rows["experts"] = (
            f"{done.experts_rounded} of {done.experts} rounded without calibration, "
            f"{done.experts_unreached} of them never reached by the text"
        )
    if done.chosen_because:
        rows["chosen because"] = done.chosen_because
    rows["time"] = report_page.duration(done.seconds)
    return rows
