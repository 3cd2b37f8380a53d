"""Run language models on ordinary CPUs from 4-bit weights.

from nybble import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble._native import __version__, kernels
    from nybble.engine import Engine, EngineStats, Piece, Request
    from nybble.errors import ContextFullError, InternalError, ModelError, QueueFullError
    from nybble.evaluation import Evaluation, Reference, evaluate
    from nybble.generation import Completion, TextStream, Timings, TokenLogprob, Usage
    from nybble.model import Message, Model, ModelInfo
    from nybble.quantization import quantize
    from nybble.report import Report
    from nybble.sampling import SamplingOptions
    from nybble.session import Session
    from nybble.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "ContextFullError",
    "Engine",
    "EngineStats",
    "Evaluation",
    "InternalError",
    "Message",
    "Model",
    "ModelError",
    "ModelInfo",
    "Piece",
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
    "engine": ("Engine", "EngineStats", "Piece", "Request"),
    "errors": ("ContextFullError", "InternalError", "ModelError", "QueueFullError"),
    "evaluation": ("Evaluation", "Reference", "evaluate"),
    "generation": ("Completion", "TextStream", "Timings", "TokenLogprob", "Usage"),
    "model": ("Message", "Model", "ModelInfo"),
    "quantization": ("quantize",),
    "report": ("Report",),
    "sampling": ("SamplingOptions",),
    "session": ("Session",),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for (PEP 562), so that weights can be packed while the tokenizers' package is imported."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"nybble.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
