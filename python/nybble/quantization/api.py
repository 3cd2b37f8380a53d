"""Quantizes a checkpoint to a 4-bit GGUF file."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nybble import _native
from nybble.models import hub
from nybble.models.locks import lock
from nybble.progress import Progress, StageProgress, stages
from nybble.quantization import calibration, datasets
from nybble.quantization import source as sources
from nybble.quantization.loaded import SourceGenerator
from nybble.quantization.measuring import Stages, Unmeasured, measure, split
from nybble.quantization.options import QuantizeOptions, QuantizeOverrides, merge_quantize_options
from nybble.quantization.report import Report
from nybble.quantization.spec import Spec
from nybble.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.quantization.datasets import Windows

_log = logging.getLogger("nybble")


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions | None = None,
    *,
    progress: StageProgress = None,
    **overrides: Unpack[QuantizeOverrides],
) -> Report:
    """Quantizes a checkpoint to 4 bits and writes it as a GGUF file for nybble and llama.cpp.

    A run that was interrupted continues when it is started again with the same arguments.

    Args:
        source: A folder with safetensors, a GGUF file of F32, F16 or BF16, or a Hub repository.
        out: The file to write.
        options: How to quantize; the defaults of `QuantizeOptions` if None.
        progress: None draws a progress bar on a terminal or in a notebook if the run takes more than a second, True
            always reports, False never. A function is called with the name of a stage, the number of its units that
            are done, and their total.
        **overrides: Single options by name, such as `recipe="gptq"` or `group=128`: see `QuantizeOptions`.

    Raises:
        FileExistsError: `out` exists and `force` is not set.
        FileNotFoundError, PermissionError, ConnectionError: The source or a text cannot be read or downloaded.
        ModelError: The source is damaged or not supported, a tensor contains NaN, or the text is too short.
        ValueError: An option is out of range.
        OSError: The file cannot be written, for example because the disk is full. No file is left at `out` then.

    Example:
        ```python
        report = nybble.quantize("org/model", "model.gguf", recipe="gptq", group=128, calibration="prose.txt")
        report.save("model.html")
        ```
    """
    return quantize_and_report(source, out, merge_quantize_options(options, overrides), (), progress=progress)


def _of_download(progress: StageProgress) -> Progress:
    return (lambda done, total: progress("downloading", done, total)) if callable(progress) else progress


def quantize_and_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    chosen: QuantizeOptions,
    pages: Sequence[Path],
    *,
    progress: StageProgress = None,
    finish: Callable[[Report, Stages], Report] | None = None,
) -> Report:
    """`quantize`, after a check that reports can be written to `pages` later, as well.

    `finish` adds figures to the report. After an interruption, only what was not measured runs again.
    """
    out = Path(out)
    unmeasured = Unmeasured(out)
    if not unmeasured.exists():
        _check_out(out, chosen)
    path = hub.resolve(source, revision=chosen.revision, progress=_of_download(progress))
    read = [path, *_documents(chosen)]
    _check_outputs(out, pages, read)
    _check_imatrix(out, pages, chosen)
    key = _key(path, chosen)
    done = unmeasured.report(key)
    if done is None:
        _check_out(out, chosen)
        sources.log_low_precision(path)
    with stages(progress, "quantizing") as shown:
        report: Stages = shown or (lambda stage, done, total: None)
        windows, held_out = _windows(path, out, chosen, report)
        if done is None:
            unmeasured.remove()
            evaluation = held_out if chosen.recipe == "auto" else None
            text = _native.quantize(
                path, out, chosen, windows=windows, evaluation=evaluation, progress=report, read=read
            )
            done = Report.from_json(text)
            _log_smaller_groups(done, chosen.group)
            _log_notes(done)
        compares = chosen.measures and held_out is not None and not done.candidates
        if compares or finish is not None:
            with unmeasured.record(key, done):
                if compares and held_out is not None:
                    done = measure(done, path, out, held_out, chosen, report)
                if finish is not None:
                    done = finish(done, report)
    _generated(out).unlink(missing_ok=True)
    return done


def quantize_to_cache(
    spec: str, path: Path, threads: int | None, progress: Callable[[int, int], object] | None
) -> Path:
    """Quantizes the checkpoint at `path` as `spec` says into nybble's cache folder, unless the file is there already.

    Args:
        spec: What `Spec.parse` reads, such as `int4:g128:gptq`.
        path: The checkpoint.
        threads: Number of threads; None takes the default.
        progress: Called with the number of units done, and the total.

    Returns:
        The GGUF file.

    Raises:
        ValueError: `spec` is not valid. Otherwise as `quantize`.
    """
    parsed = Spec.parse(spec)
    out = hub.cache_dir() / "quantized" / f"{path.stem}-{sources.fingerprint(path, parsed)}.gguf"
    if out.is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out.name):
        if out.is_file():  # Another process or thread has made it meanwhile.
            return out
        report: StageProgress = False if progress is None else lambda _, done, total: progress(done, total)
        options = QuantizeOptions(
            recipe=parsed.recipe, group=parsed.group, format=parsed.format, threads=threads, force=True
        )
        quantize(path, out, options, progress=report)
    return out


def _check_out(out: Path, options: QuantizeOptions) -> None:
    if out.exists() and not options.force:
        _native.remove_leftovers(out)
        raise FileExistsError(errno.EEXIST, "already exists; use force to overwrite it", str(out))
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(out))


def _documents(options: QuantizeOptions) -> list[Path]:
    """The files that a run reads in addition to the source."""
    given = (options.calibration, options.evaluation, options.imatrix)
    named = [document for document in given if isinstance(document, (str, os.PathLike))]
    return [Path(source) for source in named if source not in (calibration.SAMPLE, calibration.SELF)]


def _check_outputs(out: Path, pages: Sequence[Path], read: Sequence[Path]) -> None:
    """Checks before any work that a run writes nothing that it reads, and no two outputs to the same file."""
    _native.check_output(out, read)
    for working in (_generated(out), Unmeasured.path(out)):
        _native.check_output(working, read, True)
    for page in pages:
        _native.check_output(page, [*read, out])
        if page.resolve() == out.resolve():
            raise ValueError(f"report: found {page}, which is the output, expected another file")


def _check_imatrix(out: Path, pages: Sequence[Path], options: QuantizeOptions) -> None:
    """Checks that an importance matrix that is measured is not written to the place of another output."""
    if options.imatrix is not None:
        found = Path(options.imatrix)
        # Unlike `Path.resolve`, this takes a loop of links.
        if os.path.realpath(found) in [os.path.realpath(path) for path in (out, *pages)]:
            raise ValueError(f"imatrix: found {found}, which is another output, expected another file")


def _key(path: Path, options: QuantizeOptions) -> str:
    """A key of the run: the same for the same output and measurement."""
    return sources.fingerprint(path, dataclasses.replace(options, threads=None, force=False))


def _windows(path: Path, out: Path, options: QuantizeOptions, report: Stages) -> tuple[Windows | None, Windows | None]:
    """The windows to calibrate on and those to measure on, each None if not needed."""
    tokenizer = Tokenizer.load(path)
    windows = _calibration_windows(path, out, tokenizer, options, report) if options.needs_text else None
    if options.evaluation is not None:
        documents, what = datasets.as_documents(options.evaluation)
        return windows, datasets.windows(tokenizer, documents, sources.window(path), what=what)
    if options.measures and windows is not None:
        return split(windows)
    return windows, None


def _calibration_windows(
    path: Path, out: Path, tokenizer: Tokenizer, options: QuantizeOptions, report: Stages
) -> Windows:
    window, tokens = sources.window(path), options.calibration_tokens
    if options.calibration == calibration.SELF:
        # Weights in 8 bits generate text of the same quality in less time.
        return calibration.generate(
            SourceGenerator(path, tokenizer, "int8", options.threads),
            tokens,
            window=window,
            seed=options.seed,
            progress=lambda done, total: report("generating text", done, total),
            keep=_generated(out),
            key=sources.fingerprint(path),
        )
    documents, what = calibration.documents(options.calibration)
    return datasets.windows(tokenizer, documents, window, tokens, what)


def _generated(out: Path) -> Path:
    """The file that keeps generated text until the output is done."""
    return out.with_name(f"{out.name}.resume-text")


def _log_smaller_groups(done: Report, asked: int | None) -> None:
    """Logs how many matrices have rows that the requested group does not divide."""
    smaller = [
        tensor.group for tensor in done.tensors if tensor.relative_error is not None and tensor.group < (asked or 0)
    ]
    for group, count in sorted(Counter(smaller).items(), reverse=True):
        rows = f"the rows of {count} matrices" if count > 1 else "the rows of 1 matrix"
        _log.info("groups of %d do not divide %s: groups of %d there", asked, rows, group)


def _log_notes(done: Report) -> None:
    """Logs which matrices are stored in another type than was asked for, and how many experts were not calibrated."""
    reasons: dict[str, list[str]] = {}
    for tensor in done.tensors:
        if tensor.note is not None:
            reasons.setdefault(tensor.note, []).append(tensor.name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        _log.warning("%s%s: %s", names[0], others, reason)
    if done.experts_rounded:
        _log.warning(
            "%d of %d experts were rounded without calibration: fewer than 64 tokens of the text reached them, and "
            "none reached %d",
            done.experts_rounded,
            done.experts,
            done.experts_unreached,
        )
