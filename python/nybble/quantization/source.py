"""Properties of a source that are read before it is quantized."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path

from nybble import _native
from nybble.quantization import calibration

_log = logging.getLogger("nybble")


def log_low_precision(path: Path) -> None:
    """Logs if the weights of a source are already quantized: the precision lost then is not recovered."""
    if path.is_dir():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # The loader reports the error.
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if method := config.get("quantization_config", {}).get("quant_method"):
                _log.info("%s is a checkpoint of %s, whose weights are rounded already", path, method)
        return
    types = {tensor.type for tensor in _native.GgufFile(path).tensors if len(tensor.shape) > 1}
    if packed := sorted(types - {"F32", "F16", "BF16"}):
        _log.info("%s holds %s, whose weights are rounded already", path, ", ".join(packed))


def window(path: Path) -> int:
    """Tokens per window: `calibration.WINDOW`, or fewer if the model has a shorter context."""
    return min(calibration.WINDOW, _context(path))


def _context(path: Path) -> int:
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return calibration.WINDOW  # The loader reports the error.
        text = config.get("text_config", config) if isinstance(config, dict) else {}
        config = text if isinstance(text, dict) else {}
        keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
        found = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
    else:
        metadata = _native.GgufFile(path).metadata
        found = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found >= 4 else calibration.WINDOW


def fingerprint(path: Path, *more: object) -> str:
    """A key that changes with the files of a checkpoint (names, sizes, times), nybble's version, and `more`."""
    # Other files in the folder may change meanwhile: the output of this run may be there.
    inside = sorted(path.glob("*")) if path.is_dir() else [path]
    files = [file for file in inside if file.is_file() and (file == path or file.suffix in (".json", ".safetensors"))]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((_native.__version__, *more, seen)).encode()).hexdigest()[:16]
