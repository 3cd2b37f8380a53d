"""Run language models on ordinary CPUs from 4-bit weights.

from nybble import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble._native import __version__
    from nybble.chat.reasoning_splitter import OutputPart
    from nybble.completion import (
        Completion,
        FinishReason,
        Message,
        Prompt,
        Prompts,
        Timings,
        TokenLogprob,
        Usage,
    )
    from nybble.engine import Engine, EngineStats
    from nybble.engine_options import EngineOptions, EngineOverrides
    from nybble.errors import ContextFullError, EngineError, InternalError, ModelError, QueueFullError
    from nybble.generation.engine_request import Piece, Request
    from nybble.generation.stream import TextStream
    from nybble.load_options import LoadOptions, LoadOverrides
    from nybble.model import Model
    from nybble.model_info import ExpertUse, ModelInfo, kernels
    from nybble.progress import Progress, StageProgress
    from nybble.quantization.api import quantize
    from nybble.quantization.evaluation import Documents, Evaluation, Reference, evaluate
    from nybble.quantization.options import QuantizeOptions, QuantizeOverrides
    from nybble.quantization.report import Report
    from nybble.quantization.report_data import Candidate, Pruning, TaskScore, TensorReport
    from nybble.quantization.spec import Format, Recipe, SparsityPattern
    from nybble.sampling import SamplingOptions, SamplingOverrides
    from nybble.session import Session
    from nybble.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Candidate",
    "Completion",
    "ContextFullError",
    "Documents",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineOverrides",
    "EngineStats",
    "Evaluation",
    "ExpertUse",
    "FinishReason",
    "Format",
    "InternalError",
    "LoadOptions",
    "LoadOverrides",
    "Message",
    "Model",
    "ModelError",
    "ModelInfo",
    "OutputPart",
    "Piece",
    "Progress",
    "Prompt",
    "Prompts",
    "Pruning",
    "QuantizeOptions",
    "QuantizeOverrides",
    "QueueFullError",
    "Recipe",
    "Reference",
    "Report",
    "Request",
    "SamplingOptions",
    "SamplingOverrides",
    "Session",
    "SparsityPattern",
    "StageProgress",
    "TaskScore",
    "TensorReport",
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
    "_native": ("__version__",),
    "chat.reasoning_splitter": ("OutputPart",),
    "completion": ("Completion", "FinishReason", "Message", "Prompt", "Prompts", "Timings", "TokenLogprob", "Usage"),
    "engine": ("Engine", "EngineStats"),
    "engine_options": ("EngineOptions", "EngineOverrides"),
    "errors": ("ContextFullError", "EngineError", "InternalError", "ModelError", "QueueFullError"),
    "generation.engine_request": ("Piece", "Request"),
    "generation.stream": ("TextStream",),
    "load_options": ("LoadOptions", "LoadOverrides"),
    "model": ("Model",),
    "model_info": ("ExpertUse", "ModelInfo", "kernels"),
    "progress": ("Progress", "StageProgress"),
    "quantization.api": ("quantize",),
    "quantization.evaluation": ("Documents", "Evaluation", "Reference", "evaluate"),
    "quantization.options": ("QuantizeOptions", "QuantizeOverrides"),
    "quantization.report": ("Report",),
    "quantization.report_data": ("Candidate", "Pruning", "TaskScore", "TensorReport"),
    "quantization.spec": ("Format", "Recipe", "SparsityPattern"),
    "sampling": ("SamplingOptions", "SamplingOverrides"),
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

# Hidden from type checkers, so that they refuse misspelt names.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
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
    return sorted(__all__)
