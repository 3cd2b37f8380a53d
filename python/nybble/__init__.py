"""Run language models on ordinary CPUs from 4-bit weights.

from nybble import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
"""

from nybble._native import __version__, kernels
from nybble.errors import ContextFullError, InternalError, ModelError
from nybble.generation import Completion, TextStream, Timings, TokenLogprob, Usage
from nybble.model import Message, Model, ModelInfo
from nybble.sampling import SamplingOptions
from nybble.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "ContextFullError",
    "InternalError",
    "Message",
    "Model",
    "ModelError",
    "ModelInfo",
    "SamplingOptions",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
    "__version__",
    "kernels",
]
