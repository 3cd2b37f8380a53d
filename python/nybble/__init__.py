"""Run language models on ordinary CPUs from 4-bit weights.

from nybble import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble._native import __version__, kernels
    from nybble.completion import Completion, Message, Timings, TokenLogprob, Usage
    from nybble.engine import Engine, EngineStats, Piece, Request
    from nybble.engine_options import EngineOptions
    from nybble.errors import ContextFullError, EngineError, InternalError, ModelError, QueueFullError
    from nybble.generation.stream import TextStream
    from nybble.load_options import LoadOptions
    from nybble.model import Model
    from nybble.model_info import ModelInfo
    from nybble.quantization.api import quantize
    from nybble.quantization.evaluation import Evaluation, Reference, evaluate
    from nybble.quantization.options import QuantizeOptions
    from nybble.quantization.report import Report
    from nybble.sampling import SamplingOptions
    from nybble.session import Session
    from nybble.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "ContextFullError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineStats",
    "Evaluation",
    "InternalError",
    "LoadOptions",
    "Message",
    "Model",
    "ModelError",
    "ModelInfo",
    "Piece",
    "QuantizeOptions",
    "QueueFullError",
    "Reference",
    "Report",
    "Request",
    "SamplingOptions",
    "Session",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
    "__version__",
    "evaluate",
    "kernels",
    "quantize",
]

_MODULES = {
    "_native": ("__version__", "kernels"),
    "completion": ("Completion", "Message", "Timings", "TokenLogprob", "Usage"),
    "engine": ("Engine", "EngineStats", "Piece", "Request"),
    "engine_options": ("EngineOptions",),
    "errors": ("ContextFullError", "EngineError", "InternalError", "ModelError", "QueueFullError"),
    "quantization.evaluation": ("Evaluation", "Reference", "evaluate"),
    "generation.stream": ("TextStream",),
    "load_options": ("LoadOptions",),
    "model": ("Model",),
    "model_info": ("ModelInfo",),
    "quantization.api": ("quantize",),
    "quantization.options": ("QuantizeOptions",),
    "quantization.report": ("Report",),
    "sampling": ("SamplingOptions",),
    "session": ("Session",),
    "tokenizer.tokenizer": ("Tokenizer",),
}


# Modules that have moved. The old paths work for one release.
_MOVED = {
    "calibration": "quantization.calibration",
    "chat_template": "chat.template",
    "constraint": "sampling",
    "default_model": "models.default_model",
    "evaluation": "quantization.evaluation",
    "hub": "models.hub",
    "report": "quantization.report",
    "texts": "quantization.datasets",
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use (PEP 562), so that weights are packed while `tokenizers` is imported."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"nybble.{module}"), name)
            return value
    if (moved := _MOVED.get(name)) is not None:
        import warnings

        warnings.warn(f"nybble.{name} is now nybble.{moved}", DeprecationWarning, stacklevel=2)
        return import_module(f"nybble.{moved}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
