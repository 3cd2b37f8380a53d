"""From a full-precision checkpoint to a 4-bit GGUF file, and what that cost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nybble import _native
from nybble.models import hub
from nybble.quantization import calibration, datasets
from nybble.quantization.evaluation import Reference
from nybble.quantization.report import Candidate, Report
from nybble.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nybble.quantization.datasets import Windows

Recipe = Literal["auto", "rtn", "gptq", "gptq+tune", "awq", "awq+gptq", "signround"]
Format = Literal["q4_0", "q4_1", "iq4_nl"]
Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""

_log = logging.getLogger("nybble")

RECIPES = ("auto", "rtn", "gptq", "gptq+tune", "awq", "awq+gptq", "signround")
FORMATS = ("q4_0", "q4_1", "iq4_nl")
CALIBRATION_TOKENS = 65_536
_HELD_OUT = 8
"""One window of so many is held out of a calibration text, to measure with."""
_MOST_HELD_OUT = 16


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe = "auto",
    group: int | None = None,
    symmetric: bool | None = None,
    format: Format | None = None,
    search: bool = True,
    calibration: str | os.PathLike[str] | Sequence[str] = "sample",
    calibration_tokens: int = CALIBRATION_TOKENS,
    evaluation: str | os.PathLike[str] | Sequence[str] | None = None,
    measure: bool | None = None,
    target: float | None = None,
    budget: float | None = None,
    bits_per_weight: float | None = None,
    output_type: str = "q8_0",
    keep: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    revision: str | None = None,
    progress: bool | Progress = False,
) -> Report:
    """Quantizes a checkpoint to 4 bits and writes it as a GGUF file, which nybble and llama.cpp run.

    A run that was interrupted goes on where it stopped when it is started again with the same arguments.

    Args:
        source: a folder with safetensors, a GGUF file of F32, F16 or BF16, or a Hub repository.
        out: the file to write.
        recipe: how codes are found. "rtn" rounds to the nearest, "gptq", "awq" and "signround" look at what goes
            through the layers, "gptq+tune" tunes scales and norms after that (models of plain decoder blocks, such as
            Llama's), "auto" tries them from cheap to dear and keeps the best.
        group: weights that share a scale: 32, 64, 128, or 0 for whole rows; 32 if None. Rows that it does not divide
            get the next half of it that does.
        symmetric: codes around 0 (Q4_0), or with a minimum of their own for each group (Q4_1).
        format: the type of the blocks, instead of `symmetric`; without either it is q4_0, and iq4_nl for "auto".
        search: whether rounding to the nearest searches for the best scales.
        calibration: the text that recipes look at: a file (prose, or JSONL with a document a line), a list of texts,
            "sample" for the small one of the package, or "self" for what the model writes itself.
        calibration_tokens: look at only so many of its tokens.
        evaluation: the text to measure with; a part of the calibration text that recipes do not see if None.
        measure: whether the file is compared with the source in the end; if None, where `evaluation` is given. "auto"
            always measures.
        target: "auto" ends when the perplexity is within this share of the source's (0.01 by default).
        budget: "auto" ends after so many minutes with the best until then; the first recipe is always tried.
        bits_per_weight: give the most sensitive layers 5 or 8 bits, up to this average over the linear layers.
        output_type: the type of embedding and output.
        keep: types of single tensors, by name or pattern (`{"blk.0.*": "q8_0"}`).
        seed: of whatever is drawn at random. The same seed gives the same file, on any number of threads.
        threads: how many to compute with.
        force: replace a file that is there.
        revision: branch, tag or commit of a repository.
        progress: True draws a bar on a terminal; or a function that is called with what is being done, how much of it
            is done and how much there is.

    Raises:
        FileExistsError: `out` is there and `force` is not set.
        FileNotFoundError, PermissionError, ConnectionError: the source or a text cannot be had.
        ModelError: the source is damaged or not supported, a tensor holds NaN, or there is too little text.
        ValueError: an argument is out of range.
        OSError: the file cannot be written, for example because the disk is full. Nothing stands under `out` then.
    """
    out = Path(out)
    _check(out, recipe, group, symmetric, format, bits_per_weight, target, budget, force)
    path = hub.resolve(source, revision=revision)
    usual = "iq4_nl" if recipe == "auto" else "q4_0"
    grid = format or ("q4_1" if symmetric is False else usual)
    _tell_packed(path)
    with _reporter(progress) as report:
        tokenizer = Tokenizer.load(path)
        measures = recipe == "auto" or evaluation is not None if measure is None else measure
        needs_text = recipe != "rtn" or (measures and evaluation is None) or bits_per_weight is not None
        windows = (
            _calibration(path, out, tokenizer, calibration, calibration_tokens, seed, threads, report)
            if needs_text
            else None
        )
        held_out = None
        if evaluation is not None:
            documents, what = datasets.as_documents(evaluation)
            held_out = datasets.windows(tokenizer, documents, _window(path), what=what)
        elif measures and windows is not None:
            windows, held_out = _split(windows)
        options: dict[str, Any] = {
            "recipe": recipe,
            "grid": grid,
            "group": 32 if group is None else group,
            "windows": windows,
            "output_type": output_type,
            "keep": list((keep or {}).items()),
            "search": search,
            "threads": threads,
            "force": force,
            "progress": report,
        }
        more = {
            "bits_per_weight": bits_per_weight,
            "target": target,
            "budget_seconds": None if budget is None else 60 * budget,
            "evaluation": held_out if recipe == "auto" else None,
            "seed": seed if recipe in ("auto", "signround") else None,
        }
        options.update({name: value for name, value in more.items() if value is not None})
        done = Report.from_json(_native.quantize(path, out, **options))
        _written(out).unlink(missing_ok=True)
        _tell_groups(done, group)
        if measures and held_out is not None and not done.candidates:
            done = _measured(done, path, out, held_out, grid, threads, report)
    return done


def _check(
    out: Path,
    recipe: str,
    group: int | None,
    symmetric: bool | None,
    format: str | None,
    bits_per_weight: float | None,
    target: float | None,
    budget: float | None,
    force: bool,
) -> None:
    """Whatever can be known to be wrong before anything is computed."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe: found {recipe!r}, expected one of {', '.join(RECIPES)}")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: found {format!r}, expected one of {', '.join(FORMATS)}")
    if format is not None and symmetric is not None and symmetric != (format != "q4_1"):
        raise ValueError(f"symmetric: found {symmetric}, but {format} says otherwise; expected one of the two")
    if group is not None and (group < 0 or group % 32):
        raise ValueError(f"group: found {group}, expected a multiple of 32, or 0 for whole rows")
    if bits_per_weight is not None and not 4.5 <= bits_per_weight <= 8.5:
        raise ValueError(f"bits_per_weight: found {bits_per_weight}, expected 4.5 to 8.5, scales included")
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target: found {target}, expected a share of the perplexity such as 0.01")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget: found {budget}, expected minutes")
    for name, value in (("target", target), ("budget", budget)):
        if value is not None and recipe != "auto":
            raise ValueError(f"{name}: found {value} beside the recipe {recipe}, expected it beside auto alone")
    if out.exists() and not force:
        raise FileExistsError(f"{out}: exists already (force overwrites it)")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder does not exist")


def _tell_packed(path: Path) -> None:
    """Says it when a source is in few bits already: what its rounding has lost is not found again."""
    if path.is_dir():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # The library says what is wrong with it.
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if method := config.get("quantization_config", {}).get("quant_method"):
                _log.info("%s is a checkpoint of %s, whose weights are rounded already", path, method)
        return
    types = {tensor.type for tensor in _native.GgufFile(path).tensors if len(tensor.shape) > 1}
    if packed := sorted(types - {"F32", "F16", "BF16"}):
        _log.info("%s holds %s, whose weights are rounded already", path, ", ".join(packed))


def _tell_groups(done: Report, asked: int | None) -> None:
    """Says where rows had no place for the groups that were asked for."""
    smaller = [
        tensor.group for tensor in done.tensors if tensor.relative_error is not None and tensor.group < (asked or 0)
    ]
    for group, count in sorted(Counter(smaller).items(), reverse=True):
        rows = f"the rows of {count} matrices" if count > 1 else "the rows of 1 matrix"
        _log.info("groups of %d do not divide %s: groups of %d there", asked, rows, group)


def _window(path: Path) -> int:
    """Tokens to read together: fewer than usual for models that cannot hold as many."""
    return min(calibration.WINDOW, _context(path))


def _context(path: Path) -> int:
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return calibration.WINDOW  # The library says what is wrong with it.
        text = config.get("text_config", config) if isinstance(config, dict) else {}
        config = text if isinstance(text, dict) else {}
        keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
        found = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
    else:
        metadata = _native.GgufFile(path).metadata
        found = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found >= 4 else calibration.WINDOW


def _calibration(
    path: Path,
    out: Path,
    tokenizer: Tokenizer,
    source: str | os.PathLike[str] | Sequence[str],
    tokens: int,
    seed: int,
    threads: int | None,
    report: Progress,
) -> Windows:
    from nybble.model import Model

    window = _window(path)
    if source == calibration.SELF:
        # Eight bits write as well as all of them, and sooner.
        with Model.load(path, quantize="int8", threads=threads, progress=False) as model:
            return calibration.generate(
                model,
                tokens,
                window=window,
                seed=seed,
                progress=lambda done, total: report("writing texts", done, total),
                keep=_written(out),
                key=_key(path),
            )
    documents, what = calibration.documents(source)
    return datasets.windows(tokenizer, documents, window, tokens, what)


def _written(out: Path) -> Path:
    """Where texts that the model writes are kept until `out` is made."""
    return out.with_name(f"{out.name}.resume-texts")


def _key(path: Path, *more: object) -> str:
    """What tells a checkpoint from others, and from itself when it has changed."""
    # In a folder others may write meanwhile, and so does a run whose output lies there.
    inside = sorted(path.glob("*")) if path.is_dir() else [path]
    files = [file for file in inside if file.is_file() and (file == path or file.suffix in (".json", ".safetensors"))]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((_native.__version__, *more, seen)).encode()).hexdigest()[:16]


def _split(windows: Windows) -> tuple[Windows, Windows]:
    """The windows to calibrate on, and those to measure with."""
    import numpy as np

    if len(windows) == 1:
        return windows, windows  # There is nothing to hold out.
    held_out = np.zeros(len(windows), dtype=bool)
    held_out[np.arange(_HELD_OUT - 1, len(windows), _HELD_OUT)[:_MOST_HELD_OUT]] = True
    if not held_out.any():
        held_out[-1] = True
    return windows[~held_out], windows[held_out]


def _measured(
    done: Report, path: Path, out: Path, windows: Windows, grid: str, threads: int | None, report: Progress
) -> Report:
    """With the figures of the file that was written, beside those of its source."""
    from nybble.model import Model

    with Model.load(path, quantize=None, threads=threads, progress=False) as model:
        reference = Reference.of_windows(
            model, windows, progress=lambda count, total: report("measuring the source", count, total)
        )
    with Model.load(out, threads=threads, progress=False) as model:
        found = reference.compare(model, progress=lambda count, total: report("measuring the file", count, total))
    candidate = Candidate(
        recipe=done.recipe,
        format=grid,
        group=max((tensor.group for tensor in done.tensors if tensor.relative_error is not None), default=32),
        size_bytes=done.size_bytes,
        perplexity=found.perplexity,
        kl_mean=found.kl_mean,
        kl_median=found.kl_median,
        kl_p99=found.kl_p99,
        top_agreement=found.top_agreement,
        seconds=done.seconds,
        chosen=True,
    )
    return dataclasses.replace(
        done,
        candidates=(candidate,),
        reference_perplexity=found.reference_perplexity,
        kl_by_position=found.kl_by_position or (),
    )


@contextlib.contextmanager
def _reporter(progress: bool | Progress) -> Iterator[Progress]:
    if progress is True:
        from nybble.progress import stages

        with stages("quantizing") as show:
            yield show
    else:
        yield progress or (lambda stage, done, total: None)


@dataclass(frozen=True)
class Spec:
    """What `Model.load(quantize="int4:g128:gptq")` asks for."""

    recipe: Recipe = "rtn"
    group: int = 32
    format: Format = "q4_0"

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads `int4`, then in any order, behind colons, a recipe, `g` and a size of groups, a format or `asym`.

        Raises:
            ValueError: a part is none of these.
        """
        kind, *parts = text.split(":")
        values: dict[str, Any] = {}
        for part in parts:
            if part in RECIPES and part != "auto":
                key, value = "recipe", part
            elif part in (*FORMATS, "sym", "asym"):
                key, value = "format", {"sym": "q4_0", "asym": "q4_1"}.get(part, part)
            elif part[:1] == "g" and part[1:].isascii() and part[1:].isdigit() and int(part[1:]) % 32 == 0:
                key, value = "group", int(part[1:])  # type: ignore[assignment]
            else:
                key, value = "", part
            if not key or key in values or kind != "int4":
                raise ValueError(
                    f"quantize: found {text!r}, expected auto, stored, int4, int8, or int4 with parts such as "
                    "int4:g128:gptq (a group, a recipe, a format, each once)"
                )
            values[key] = value
        return cls(**values)

    def apply(self, path: Path, threads: int | None, progress: Callable[[int, int], object] | None) -> Path:
        """The file that the checkpoint at `path` becomes: made now, or kept from the last time."""
        out = hub.cache_dir() / "quantized" / f"{path.stem}-{_key(path, self)}.gguf"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            tell = (lambda _, done, total: progress(done, total)) if progress is not None else False
            quantize(
                path,
                out,
                recipe=self.recipe,
                group=self.group,
                format=self.format,
                threads=threads,
                force=True,
                progress=tell,
            )
        return out
