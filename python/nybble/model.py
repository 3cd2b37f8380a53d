"""The class that most programs need: a loaded model that reads and writes text."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from nybble import _native, memory
from nybble.errors import ModelError
from nybble.generation import Completion, TextStream, Writer, run
from nybble.load_options import LoadOptions, LoadOverrides, merge_load_options
from nybble.models import hub
from nybble.progress import bar
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from nybble.session import Session
    from nybble.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "Hello"}`."""

Prompts = list[str] | tuple[str, ...]
"""Several prompts. Any sequence would do, but to a type checker a string is one too."""


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is and how it runs."""

    file: Path
    name: str
    """What the file calls the model; may be empty."""
    family: str
    parameters: int
    """Weights in matrices."""
    layers: int
    hidden_size: int
    vocabulary: int
    context: int
    """Tokens that fit, prompt and completion together."""
    kernel: str
    threads: int
    weight_bytes: int
    """Bytes of weights in memory, as packed."""
    bytes_per_token: int
    """Bytes of weights that one more token reads; what memory bandwidth is spent on."""
    cache_type: str
    """How keys and values of the tokens seen are stored: "f16", "int8" or "f32"."""
    cache_bytes_per_token: int
    """Bytes of keys and values that each token of a text takes while it is worked on."""
    cache_bytes: int
    """Bytes of keys and values of a sequence that fills the context. One that holds less takes less."""

    @property
    def resident_bytes(self) -> int | None:
        """Memory that this process holds now, models and all; None where the system does not tell."""
        return memory.resident_bytes()

    @property
    def peak_resident_bytes(self) -> int | None:
        """The most memory that this process has held so far; None where the system does not tell."""
        return memory.peak_resident_bytes()


def _tokenizer(file: Path, mmap: bool) -> Tokenizer:
    # The packages that this imports take as long as the weights of a small model do.
    from nybble.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(file, mmap=mmap)


class _InBackground(Generic[T]):
    """Computes something beside the block that it is given to: packing weights needs no Python, a vocabulary only that.

    An executor would do the same, but importing it takes longer than some models take to load.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._result = self._compute()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> _InBackground[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def result(self) -> T:
        """What was computed, once the block has ended."""
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


class Model:
    """A language model on the CPU. `Model.load` makes one.

    Any number of threads may use one model at the same time; each call has a state of its own.
    """

    def __init__(self, native: _native.Model, tokenizer: Tokenizer, file: Path) -> None:
        self._native_model: _native.Model | None = native
        self.tokenizer = tokenizer
        self.info = ModelInfo(file=file, **native.info())

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        options: LoadOptions | None = None,
        *,
        progress: Callable[[int, int], object] | Literal[False] | None = None,
        **overrides: Unpack[LoadOverrides],
    ) -> Model:
        """Loads a model, and downloads it first if it is not on this machine.

        Args:
            source: A GGUF file, a folder of its shards, a folder with `config.json` and safetensors files, a Hub
                repository (`org/name`), or None for the default model.
            options: How to load it; the defaults of `LoadOptions` if None.
            progress: Called from time to time with the number of weights packed and their total. An exception that
                it raises stops the loading, as Ctrl-C does. None draws a progress bar if standard error is a terminal
                and loading takes more than a second. False draws none.
            **overrides: Single options by name, such as `threads=4` or `filename="*Q4_K_M.gguf"`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The file cannot be read or downloaded.
            ModelError: The file is damaged or not supported.
            ValueError: An argument is out of range. For an unknown kernel the message lists those that this CPU runs.
            MemoryError: The weights do not fit into memory.

        Example:
            ```python
            model = Model.load("model.gguf", threads=4)
            model = Model.load("Qwen/Qwen2.5-0.5B-Instruct-GGUF", filename="*Q4_K_M.gguf")
            ```
        """
        chosen = merge_load_options(options, overrides)
        for name, count in (("threads", chosen.threads), ("context", chosen.context)):
            if isinstance(count, int) and not 0 <= count < 2**63:
                raise ValueError(f"{name}: found {count}, expected 1 or more")
        file = hub.resolve(source, filename=chosen.filename, revision=chosen.revision)
        quantize, mmap = chosen.quantize, chosen.mmap
        with contextlib.ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(bar(f"loading {file.name}"))
            if quantize is not None and ":" in quantize:
                from nybble.quantization.api import Spec

                file, quantize = Spec.parse(quantize).apply(file, chosen.threads, progress or None), None
            # A file that is read, not mapped, is in memory once already: then the vocabulary waits for its turn.
            background = stack.enter_context(_InBackground(lambda: _tokenizer(file, mmap))) if mmap else None
            native = _native.Model.load(
                file,
                chosen.kernel,
                chosen.threads,
                chosen.context,
                quantize or "stored",
                chosen.cache_type,
                mmap,
                progress or None,
            )
        return cls(native, _tokenizer(file, mmap) if background is None else background.result(), file)

    @overload
    def generate(
        self, prompt: str, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Prompts, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | Prompts,
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | list[Completion]:
        """Continues a prompt, or several as one batch, which gives the same texts in less time.

        Args:
            prompt: the text to continue, or a list of them.
            options: how to choose tokens and when to stop; the defaults of `SamplingOptions` if None.
            **overrides: single options by name, such as `max_tokens=64` or `temperature=0`.

        Raises:
            ContextFullError: a prompt alone does not fit into the context. Nothing has been computed then.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise TypeError(f"prompt: found {type(prompt).__name__}, expected str or a list of str")
        single = isinstance(prompt, str)
        merged = merge(options, overrides)
        model = self._native
        writers = [self._writer(text, merged) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        run(model, writers)
        completions = [writer.completion() for writer in writers]
        return completions[0] if single else completions

    def stream(
        self, prompt: str, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> TextStream:
        """Continues a prompt piece by piece: `for piece in model.stream("Once"): print(piece, end="", flush=True)`.

        The pieces joined are the text that `generate` returns.
        """
        return TextStream(self._native, self._writer(prompt, merge(options, overrides)))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[False] = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[True],
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream: ...
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream:
        """Answers a conversation in the form that the model was trained on (its chat template).

        Args:
            messages: the turns so far, `[{"role": "user", "content": "Hello"}]`; roles are system, user, assistant.
            options: as in `generate`.
            stream: give the answer piece by piece instead of at once.
            **overrides: as in `generate`.

        Raises:
            ModelError: the model has no chat template, or the template refuses the messages.
        """
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        merged = merge(options, overrides)
        return self.stream(prompt, merged) if stream else self.generate(prompt, merged)

    def session(self) -> Session:
        """An empty text, to be continued call by call: what was read and written once is not computed again."""
        from nybble.session import Session

        return Session(self, _native.Session(self._native))

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A text that `Session.save` wrote, which goes on with the bits that it would have gone on with.

        Raises:
            FileNotFoundError, PermissionError: the file cannot be had.
            ModelError: the file is damaged, or was written with another model, another `cache_type` or more context.
        """
        from nybble.session import Session

        return Session(self, *_native.Session.load(self._native, path))

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text, with the model's start token where it wants one."""
        return self.tokenizer.encode(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    def logits(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The model's logits after each of `ids`: an array of shape (len(ids), vocabulary)."""
        return self._native.logits(list(ids))

    def embed(
        self,
        text: str | Prompts,
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Texts as vectors, to compare or search by: an array of shape (texts, hidden_size), one row for one text.

        The model's hidden states behind the last norm, made one vector. Models trained for it tell in their cards which
        pooling they want; those trained to write give vectors that tell texts apart only roughly.

        Args:
            text: a text, or a list of them.
            pooling: "mean" of all tokens, or that of the "last" token.
            normalize: make each vector one of length 1.

        Raises:
            ContextFullError: a text does not fit into the context.
            ValueError: a text without tokens, or an unknown pooling.
        """
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling: found {pooling!r}, expected mean or last")
        import numpy as np

        rows = []
        for ids in map(self._prompt_ids, [text] if isinstance(text, str) else text):
            states = self._native.hidden_states(ids)
            row = states[-1] if pooling == "last" else states.mean(axis=0, dtype=np.float64)
            rows.append(row / max(float(np.linalg.norm(row)), 1e-12) if normalize else row)
        return np.array(rows, np.float32).reshape(len(rows), self.info.hidden_size)

    def close(self) -> None:
        """Gives the memory back as soon as calls in other threads have ended. Any later use is an error."""
        self._native_model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        state = "" if self._native_model is not None else ", closed"
        return f"<Model {info.name or info.file.name} ({info.family}, {info.kernel}, {info.threads} threads{state})>"

    @property
    def _native(self) -> _native.Model:
        if self._native_model is None:
            raise ModelError("the model is closed")
        return self._native_model

    def _writer(self, prompt: str | Sequence[int], options: SamplingOptions) -> Writer:
        return Writer(self._native, self.tokenizer, self._prompt_ids(prompt), options, self.info.context)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if ids:
            return ids
        # A model cannot begin from nothing; those that know a start token can begin from that.
        if self.tokenizer.bos_id is None:
            raise ValueError("prompt: found no tokens, expected at least one")
        return [self.tokenizer.bos_id]
