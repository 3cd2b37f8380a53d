"""Options of `Model.load`, defined once for Python and for the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from nybble.overrides import check_types, chosen, doc

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `Model.load`, which also takes each of them by name.

    Raises:
        TypeError: An option has the wrong type.

    Example:
        ```python
        options = LoadOptions(threads=4, cache_type="int8")
        model = Model.load("model.gguf", options)
        same = Model.load("model.gguf", threads=4, cache_type="int8")
        ```
    """

    filename: str | None = field(
        default=None, metadata=doc('Which GGUF file of a folder or repository, such as "*Q4_K_M.gguf".', "PATTERN")
    )
    """A name or a pattern (`*Q4_K_M.gguf`) of the GGUF file to take from a folder or repository."""
    revision: str | None = field(default=None, metadata=doc("Branch, tag or commit of a repository.", "NAME"))
    """Branch, tag or commit of a Hub repository."""
    kernel: str | None = field(
        default=None,
        metadata=doc("Instruction set to compute with; NYBBLE_KERNEL, or else the best one, if not given.", "NAME"),
    )
    """Instruction set to compute with. `kernels()` lists those that this CPU runs.

    None takes that of the environment variable `NYBBLE_KERNEL`, or else the best.
    """
    threads: int | None = field(
        default=None,
        metadata=doc("Threads to compute with; NYBBLE_NUM_THREADS, or else the physical cores, if not given."),
    )
    """Number of threads.

    None takes that of the environment variable `NYBBLE_NUM_THREADS`, or else the number of physical cores available to
    this process.
    """
    context: int | None = field(
        default=None,
        metadata=doc("Tokens of context, prompt and completion together; the model's limit if not given."),
    )
    """Number of tokens in the context, prompt and completion together.

    None takes the model's limit, or its original training length if a longer context would change the results of short
    prompts.
    """
    quantize: str | None = field(
        default="auto", metadata=doc("Quantize F32, F16 and BF16 weights while loading: auto, int4 or int8.")
    )
    """How to store weights that the file holds as F32, F16 or BF16.

    - `"int4"`: layers in 4 bits, embedding and output in 8.
    - `"int8"`: all of them in 8 bits.
    - `None`: compute with the weights as stored.
    - `"auto"`: `"int4"` for safetensors, None for GGUF files. Layers stored in 4 bits stay unchanged.
    - `"int4:g128:gptq"`: what `nybble.quantize` writes, calibrated on its sample and kept in nybble's cache folder.
      After `int4`, in any order: a recipe, a group size (`g64`; `g0` for whole rows), and a format or `asym`.
    """
    cache_type: Literal["f16", "int8", "f32"] | None = field(
        default=None, metadata=doc("Type of the KV cache; int8 takes about half the memory of f16.")
    )
    """Type of the KV cache: `"f16"`, `"int8"` (about half the memory) or `"f32"`.

    Keys or values beyond 65504 raise `ModelError` with `"f16"`; the others hold them. None is `"f16"`, and `"f32"` for
    models that compute in F32.
    """
    mtp: bool | None = field(
        default=None, metadata=doc("Load the head for multi-token prediction together with the model, or never.")
    )
    """Load the model's head for multi-token prediction, if the file has one, together with the model.

    None loads it from the same file when an engine with `speculation="mtp"` or `"auto"` first needs it. False does not
    use it.
    """
    expert_memory: float | str | None = field(
        default=None,
        metadata=doc(
            "Memory for the experts of a GGUF file, in gigabytes, or auto. Others are read when tokens choose them.",
            "GB",
        ),
    )
    """Memory for the experts of a model, in gigabytes: for mixtures of experts that do not fit into memory.

    The experts that tokens chose most lately stay in memory. The others are read from the GGUF file when a token
    chooses them, which must stay and not change while the model is used. Results do not depend on the limit. `"auto"`
    limits experts only if the model does not fit into the memory that is free, to three quarters of what other weights
    leave. None keeps all in memory.
    """
    expert_skip: float | None = field(
        default=None,
        metadata=doc(
            "Leave out experts of a token whose weights are below this share of its largest one, from 0 to 1.", "RATIO"
        ),
    )
    """Leaves out the experts of a token whose weights are less than this share of the largest one's, from 0 to 1.

    Fewer experts are faster and change results: `nybble eval` measures by how much. With 0, weights are only counted,
    for `Model.expert_use`.
    """
    mmap: bool = field(
        default=True,
        metadata=doc("Map files into memory while they load. --no-mmap reads them: safe if a file changes meanwhile."),
    )
    """Map the file into memory while it loads.

    False reads it, which takes its size in memory during that time. Use False if another process may shorten or
    overwrite the file: shortening a mapped file can end this process.
    """

    def __post_init__(self) -> None:
        texts = dict.fromkeys(("filename", "revision", "kernel", "quantize", "cache_type"), str)
        numbers = {"expert_memory": (int, float, str), "expert_skip": (int, float)}
        check_types(self, {**texts, **numbers, "threads": int, "context": int, "mtp": bool, "mmap": bool})

    def for_draft(self) -> LoadOptions:
        """Returns a copy for a draft model, which may have no experts."""
        expert_memory = None if self.expert_memory is None else "auto"
        return dataclasses.replace(self, expert_memory=expert_memory, expert_skip=None)

    def for_reference(self) -> LoadOptions:
        """Returns a copy for another model that this one is compared with, whose weights stay as stored."""
        return dataclasses.replace(self.for_draft(), filename=None, revision=None, quantize="stored")

    def replace(self, **overrides: Unpack[LoadOverrides]) -> LoadOptions:
        """Returns a copy with some options changed."""
        return dataclasses.replace(self, **overrides)


class LoadOverrides(TypedDict, total=False):
    """Names and types of the fields of `LoadOptions`, for type checkers."""

    filename: str | None
    revision: str | None
    kernel: str | None
    threads: int | None
    context: int | None
    quantize: str | None
    cache_type: Literal["f16", "int8", "f32"] | None
    mtp: bool | None
    expert_memory: float | str | None
    expert_skip: float | None
    mmap: bool


def merge_load_options(options: LoadOptions | None, overrides: LoadOverrides) -> LoadOptions:
    """Returns `options`, or the defaults, with single options replaced.

    Raises:
        TypeError: `options` is of another type, or an override is not an option. The message lists the options.
    """
    return chosen(LoadOptions, options, overrides)
