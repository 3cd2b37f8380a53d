"""`nybble eval`: perplexity of a model on a text, and its divergence from a reference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import terminal
from nybble.cli.options import AdapterOption, load_model, takes_options
from nybble.load_options import LoadOptions

if TYPE_CHECKING:
    from nybble.model import Model
    from nybble.model_info import ExpertUse
    from nybble.quantization.evaluation import Evaluation


@takes_options
def evaluate(
    load: LoadOptions,
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a folder or a Hub repository.")],
    text: Annotated[
        Path, typer.Option("--text", help="The text: prose, or JSONL with one document per line.", metavar="FILE")
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="A model to compare with, computed with its weights as stored.", metavar="REF"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use at most this many tokens of the text.", min=4, metavar="N")
    ] = None,
    window: Annotated[
        int,
        typer.Option(
            "--window", help="Tokens per window. The second half of each window is scored.", min=4, metavar="N"
        ),
    ] = 512,
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize", help="How to pack F32, F16 and BF16 weights: auto, stored, int4 or int8.", metavar="TYPE"
        ),
    ] = "auto",
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the perplexity of a model on a text and, with --reference, its divergence from another model.

    With --expert-skip and no reference, the model is compared with itself without it.

    The figures are defined as in llama.cpp's perplexity tool.
    """
    from nybble.models import hub
    from nybble.progress import bar
    from nybble.quantization import evaluation

    recorded = None
    if reference is not None or load.expert_skip:
        # A model that is missing ends the command now, and not after the minutes that the reference takes.
        hub.resolve(source, filename=load.filename, revision=load.revision)
        # One model in memory at a time: the predictions of the reference go to a temporary file.
        if reference is None:
            compared, other = source, load.replace(quantize=quantize, expert_skip=None)
        else:
            compared, other = reference, load.for_reference()
        with (
            load_model(compared, other, adapter if reference is None else None) as model,
            bar("evaluating the reference") as advance,
        ):
            recorded = evaluation.Reference(model, text, window=window, max_tokens=max_tokens, progress=advance)
    with load_model(source, load.replace(quantize=quantize), adapter) as model, bar("evaluating") as advance:
        if recorded is None:
            measured = evaluation.evaluate(model, text, window=window, max_tokens=max_tokens, progress=advance)
        else:
            measured = recorded.compare(model, progress=advance)
        experts = model.expert_use
    if as_json:
        figures = dataclasses.asdict(measured)
        del figures["kl_by_position"]  # Hundreds of numbers, which the Python API returns.
        figures |= {f"experts_below_{ratio}": share for ratio, share in _shares(experts, load.expert_skip).items()}
        typer.echo(json.dumps({key: value for key, value in figures.items() if value is not None}))
    else:
        _print(model, measured, _shares(experts, load.expert_skip))


_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Values of --expert-skip whose effects are shown."""


def _shares(experts: ExpertUse, skip: float | None) -> dict[float, float]:
    """The shares of chosen experts that different ratios leave out, the one of the command among them."""
    if not experts.weight_shares or skip is None:
        return {}
    return {ratio: experts.below(ratio) for ratio in sorted({*_RATIOS, round(skip, 2)} - {0})}


def _print(model: Model, measured: Evaluation, experts: Mapping[float, float]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)

    def row(
        name: str, value: float | None, error: float | None = None, *, percent: bool = False, digits: int = 4
    ) -> None:
        if value is not None:
            scale, unit = (100, " %") if percent else (1, "")
            spread = "" if error is None else f"± {scale * error:.{digits}f}{unit}"
            table.add_row(name, f"{scale * value:.{digits}f}{unit}", spread)

    table.add_row("tokens scored", f"{measured.tokens:,}", "")
    row("perplexity", measured.perplexity, measured.perplexity_error)
    row("of the reference", measured.reference_perplexity, measured.reference_perplexity_error)
    row("ratio", measured.perplexity_ratio, measured.perplexity_ratio_error)
    row("KL divergence, mean", measured.kl_mean, measured.kl_mean_error, digits=6)
    row("  median", measured.kl_median, digits=6)
    row("  90th percentile", measured.kl_p90, digits=6)
    row("  99th percentile", measured.kl_p99, digits=6)
    row("same top token", measured.top_agreement, measured.top_agreement_error, percent=True, digits=3)
    row("RMS Δp", measured.rms_dp, measured.rms_dp_error, percent=True, digits=3)
    for ratio, share in experts.items():
        row(f"experts below {ratio:g} of the largest", share, percent=True, digits=1)
    console = terminal.console()
    console.print(terminal.printable(model.info.name or model.info.file.name), style="bold", soft_wrap=True)
    console.print(table)
