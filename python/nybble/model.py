"""`Model`: a loaded language model."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from nybble import _native
from nybble.completion import Completion, Message, Prompt, Prompts
from nybble.embeddings import vectors
from nybble.errors import ModelError
from nybble.generation.chatting import Chatting
from nybble.generation.request import as_prompts, prepare, token_ids
from nybble.generation.stream import TextStream, generate
from nybble.load_options import LoadOptions, LoadOverrides, merge_load_options
from nybble.model_info import ExpertUse, ModelInfo
from nybble.overrides import keyword_only
from nybble.progress import Progress, counts
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from nybble.session import Session
    from nybble.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

__all__ = ["Message", "Model", "ModelInfo", "Prompt", "Prompts"]


def _tokenizer(file: Path, mmap: bool) -> Tokenizer:
    # Imported here: its packages take as long to import as a small model takes to load.
    from nybble.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(file, mmap=mmap)


def _warn(path: str | os.PathLike[str], notes: Sequence[str]) -> None:
    import logging

    for note in notes:
        logging.getLogger("nybble").warning("%s: %s", os.fspath(path), note)


class _InBackground(Generic[T]):
    """Runs a function in a thread during a `with` block.

    Packing weights needs no Python, and loading a vocabulary needs nothing else, so both run at the same time.
    Importing `concurrent.futures` would take longer than some models take to load.
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
        """Returns the result, after the block. Raises what the function raised."""
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


class Model(Chatting):
    """A language model on the CPU.

    `Model.load` returns one. Any number of threads may use a model at the same time; each call has its own state.
    Results are bit-identical across thread counts, batch sizes and CPUs.

    Attributes:
        tokenizer: Converts between text and token ids.
        info: The model's properties.

    Example:
        ```python
        from nybble import Model

        with Model.load() as model:
            print(model.generate("Once upon a time", max_tokens=64))
            for piece in model.chat([{"role": "user", "content": "Hello"}], stream=True):
                print(piece, end="", flush=True)
        ```
    """

    _returned_by = "Model.load(...)"
    _instead_of_pickling = "load it in the other process with Model.load, which shares the pages of the file"
    tokenizer: Tokenizer
    info: ModelInfo
    _native_model: _native.Model | None
    _source: Path
    """What was loaded. With `quantize`, `info.file` may be a copy of it in the cache."""
    _cache_limit: int | None = None
    """The default size of the KV cache in bytes; None follows the free memory of this process."""

    @classmethod
    def _of(cls, native: _native.Model, tokenizer: Tokenizer, file: Path, source: Path) -> Self:
        model = cls.__new__(cls)
        model._native_model, model.tokenizer, model._source = native, tokenizer, source
        model.info = ModelInfo(file=file, **native.info())
        return model

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        options: LoadOptions | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        progress: Progress = None,
        **overrides: Unpack[LoadOverrides],
    ) -> Model:
        """Loads a model, and downloads it first if it is not on this machine.

        Args:
            source: A GGUF file, a folder of its shards, a folder with `config.json` and safetensors files, a Hub
                repository (`org/name`), or None for the default model.
            options: How to load it; the defaults of `LoadOptions` if None.
            adapter: A LoRA adapter that applies to everything: a folder that PEFT has saved, or a GGUF file.
            adapters: LoRA adapters by name. Each call chooses one with `adapter="name"`, or none of them.
            progress: None draws a progress bar on a terminal or in a notebook if it takes more than a second, True
                always reports, False never. A function is called from time to time: during a download with the number
                of bytes and their total, then with the number of weights packed and their total. An exception that it
                raises stops the loading, as Ctrl-C does.
            **overrides: Single options by name, such as `threads=4` or `filename="*Q4_K_M.gguf"`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The file cannot be read or downloaded.
            ModelError: The file or an adapter is damaged or not supported. Nothing of an adapter is applied in part.
            ValueError: An argument is out of range, or both `adapter` and `adapters` are given. For an unknown kernel
                the message lists those that this CPU runs.
            MemoryError: The weights do not fit into memory.

        Example:
            ```python
            model = Model.load("model.gguf", threads=4)
            model = Model.load("Qwen/Qwen2.5-0.5B-Instruct-GGUF", filename="*Q4_K_M.gguf")
            ```
        """
        if adapter is not None and adapters:
            raise ValueError("adapter: found adapters as well, expected one for everything or several by name")
        chosen = merge_load_options(options, overrides)
        for name, count in (("threads", chosen.threads), ("context", chosen.context)):
            if isinstance(count, int) and not 0 <= count < 2**63:
                raise ValueError(f"{name}: found {count}, expected 1 or more")
        for name, number in (("expert_memory", chosen.expert_memory), ("expert_skip", chosen.expert_skip)):
            if isinstance(number, (int, float)) and not 0 <= number < 1e9:
                raise ValueError(f"{name}: found {number}, expected a number that is not negative")
        # Imports of what not every program needs come late: a program that imports nybble starts sooner.
        from nybble.models import hub

        file = original = hub.resolve(source, filename=chosen.filename, revision=chosen.revision, progress=progress)
        mmap = chosen.mmap
        with contextlib.ExitStack() as stack:
            report = stack.enter_context(counts(progress, f"loading {file.name}"))
            if chosen.quantize is not None and ":" in chosen.quantize:
                from nybble.quantization.api import quantize_to_cache

                file = quantize_to_cache(chosen.quantize, file, chosen.threads, report)
                chosen = chosen.replace(quantize=None)
            # Without mmap the file takes memory while it loads, and reading its vocabulary waits for that memory.
            background = stack.enter_context(_InBackground(lambda: _tokenizer(file, mmap))) if mmap else None
            native = _native.Model.load(file, chosen, report)
        for note in native.notes():
            # Imported here, as most files need no note, and the module takes longer to import than this one.
            import logging

            logging.getLogger("nybble").warning("%s: %s", original, note)
        tokenizer = _tokenizer(file, mmap) if background is None else background.result()
        model = cls._of(native, tokenizer, file, original)
        if adapter is not None:
            _warn(adapter, native.set_adapter(adapter))
        for name, path in (adapters or {}).items():
            model.load_adapter(name, path)
        return model

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads a LoRA adapter under a name, with which later calls choose it.

        The weights of the model stay as they are, and all adapters share them. Requests with different adapters are
        computed in one batch. An adapter of the same name is replaced; requests and sessions that have it keep it.

        Args:
            name: Characters of A-Z, a-z, 0-9, `.`, `_` and `-`.
            path: A folder that PEFT has saved, or a GGUF file.

        Raises:
            FileNotFoundError, PermissionError: A file cannot be read.
            ModelError: The adapter is damaged, belongs to another model, or has a part that is not supported. The
                message names it.
            ValueError: The name has other characters, or an adapter applies to everything.

        Example:
            ```python
            model.load_adapter("pirate", "pirate-lora")
            print(model.generate("Hello", adapter="pirate"))
            ```
        """
        _warn(path, self._native.load_adapter(name, path))

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests and sessions that have it keep it, and its memory is freed with the last.

        Raises:
            ValueError: No adapter has this name.
        """
        if not self._native.unload_adapter(name):
            expected = ", ".join(self.adapters) or "no name: the model has no adapters"
            raise ValueError(f"adapter: found {name!r}, expected {expected}")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that calls can choose."""
        return tuple(self._native.adapters())

    @property
    def expert_use(self) -> ExpertUse:
        """What tokens have chosen of the experts so far, for models with `expert_memory` or `expert_skip`."""
        used = self._native.expert_use()
        counts = {name: tuple(map(tuple, used[name])) for name in ("weight_shares", "chosen")}
        return ExpertUse(**{**used, **counts})

    @overload
    def generate(
        self, prompt: Prompts, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> Completion: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | list[Completion]:
        """Generates the completion of a prompt, or of several prompts as one batch.

        A batch gives the same completions as separate calls, in less time.

        Args:
            prompt: A prompt (text or token ids), or a list of prompts.
            options: How to sample and when to stop; the defaults of `SamplingOptions` if None.
            **overrides: Single options by name, such as `max_tokens=64` or `temperature=0`.

        Returns:
            A completion, or a list of completions in the order of the prompts.

        Raises:
            ContextFullError: A prompt does not fit into the context. Nothing has been computed.
            MemoryError: The KV cache does not fit into memory.
            ModelError: The model is closed, or its logits contain no finite value.
            TypeError: An override is not an option.
            ValueError: An option is out of range.

        Example:
            ```python
            completion = model.generate("Once upon a time", max_tokens=64, seed=1)
            print(completion.text, completion.finish_reason, completion.usage)
            first, second = model.generate(["One", "Two"], temperature=0)
            ```
        """
        chosen = merge(options, overrides)
        prompts, is_one = as_prompts(prompt)
        names = ["prompt"] if is_one else [f"prompt[{number}]" for number in range(len(prompts))]
        requests = [prepare(self, each, chosen, name) for each, name in zip(prompts, names, strict=True)]
        completions = generate(self, requests)
        return completions[0] if is_one else completions

    def stream(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> TextStream:
        """Generates the completion of a prompt piece by piece.

        The pieces together are the text that `generate` returns.

        Args:
            prompt: The prompt: text or token ids.
            options: As in `generate`.
            **overrides: As in `generate`.

        Returns:
            An iterator over pieces of text. Its `completion` has the finish reason, usage and timings. `close()`, or a
            `with` block, ends it early and frees its KV cache.

        Raises:
            ContextFullError: The prompt does not fit into the context.
            Exception: Otherwise as `generate` does. Errors of the computation are raised by the iterator.

        Example:
            ```python
            for piece in model.stream("Once upon a time"):
                print(piece, end="", flush=True)
            ```
        """
        return TextStream._of(self, prepare(self, prompt, merge(options, overrides)))

    def _next_turn(self, prompt: str, options: SamplingOptions, *, stream: bool) -> Completion | TextStream:
        request = prepare(self, prompt, options)
        if stream:
            return TextStream._of(self, request, separates=True)
        return generate(self, [request], separates=True)[0]

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def session(self, *, adapter: str | None = None) -> Session:
        """Returns an empty session, which keeps its KV cache between calls, so that no token is computed twice.

        Args:
            adapter: The name of the adapter that the session is computed with; None for the model alone.

        Raises:
            ValueError: No adapter has this name.
        """
        from nybble.session import Session

        return Session._of(self, self._native.session(adapter))

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Reads a session that `Session.save` wrote. It continues with the same tokens as the saved session.

        Raises:
            FileNotFoundError, PermissionError: The file cannot be read.
            ModelError: The file is damaged, or belongs to another model, another adapter, another `cache_type` or a
                larger context.
        """
        from nybble.session import Session

        return Session._of(self, *self._native.load_session(path))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: The text.
            add_special: Add the start and end tokens that the model expects.
            parse_special: Encode special tokens that are spelled out in the text as these tokens.
        """
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    @keyword_only(ids="prompt")
    def logits(
        self, prompt: Prompt | npt.NDArray[np.integer[Any]], *, adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Returns the logits after each token, a float32 array of shape (tokens, vocabulary).

        Args:
            prompt: Text or token ids.
            adapter: The name of the adapter to compute with; None for the model alone.

        Raises:
            ContextFullError: The tokens do not fit into the context.
            MemoryError: The logits do not fit into memory.
            ValueError: A token or the adapter is unknown.
        """
        if getattr(prompt, "ndim", 1) != 1:
            shape = getattr(prompt, "shape", ())
            raise ValueError(f"prompt: found an array of shape {shape}, expected text or token ids in one dimension")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt, "prompt")
        return self._native.logits(ids, adapter)

    def mtp_logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """Returns the logits of the model's head for multi-token prediction, of shape (tokens - 1, vocabulary).

        Row `i` predicts token `i + 2` from the model's state at token `i` and token `i + 1`.

        Args:
            prompt: Text or token ids.

        Raises:
            ContextFullError: The tokens do not fit into the context.
            ValueError: The model has no such head, or a token is unknown.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt, "prompt")
        return self._native.mtp_logits(ids)

    def embed(
        self,
        text: Prompt | Prompts,
        *,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool = True,
        prompt: str | None = None,
        adapter: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Returns embeddings of documents, a float32 array of shape (documents, `info.embedding_size`).

        An embedding pools the hidden states after the last norm. Dense modules of the model follow. Use a model trained
        for embeddings. Other models give embeddings of low quality. Batches never change an embedding.

        Args:
            text: A document (text or token ids), or a list of documents.
            pooling: "mean" of all tokens, or the first ("cls") or "last" token. None is what the files say, otherwise
                "mean".
            normalize: Scale each embedding to length 1.
            prompt: The name of one of `prompts`, which is put before each text. None is the model's default prompt, if
                it has one. Token ids stay as they are.
            adapter: The name of the adapter to compute with; None for the model alone.

        Raises:
            ContextFullError: A document does not fit into the context.
            ModelError: A hidden state is not finite, or keys or values do not fit into the cache type.
            ValueError: A document has no tokens, or `pooling`, `prompt` or `adapter` is unknown.

        Example:
            ```python
            vectors = model.embed(["a small boat", "a little ship"])
            query = model.embed("boats", prompt="query")
            ```
        """
        return vectors.embed(self, text, pooling, normalize, prompt, adapter)

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts for `embed` by name, from `config_sentence_transformers.json`."""
        return vectors.prompts(self.info.file).texts

    def classify(self, text: Prompt | Prompts, *, adapter: str | None = None) -> npt.NDArray[np.float32]:
        """Returns scores of a text for each of `info.labels`, a float32 array of shape (labels,).

        The scores are logits: a softmax, or a sigmoid for labels that exclude nothing, turns them into probabilities.

        Args:
            text: A text or token ids. For a list of them, the array has the shape (documents, labels).
            adapter: The name of the adapter to compute with; None for the model alone.

        Raises:
            ContextFullError: A text does not fit into the context.
            ModelError: The model has no classification head.
            ValueError: A text has no tokens, or the adapter is unknown.
        """
        return vectors.classify(self, text, adapter)

    def rerank(self, query: str, documents: Sequence[str], *, adapter: str | None = None) -> npt.NDArray[np.float32]:
        """Returns the relevance of each document to a query, a float32 array of shape (documents,).

        A higher score is more relevant. The scores are logits: a sigmoid turns them into probabilities.

        Args:
            query: The query.
            documents: The documents.
            adapter: The name of the adapter to compute with; None for the model alone.

        Raises:
            ContextFullError: The query and a document do not fit into the context together.
            ModelError: The model has no classification head with one score, or with the labels yes and no.

        Example:
            ```python
            scores = model.rerank("What is a panda?", ["A bear from China.", "A kind of boat."])
            best = int(scores.argmax())
            ```
        """
        return vectors.rerank(self, query, documents, adapter)

    def close(self) -> None:
        """Frees the model as soon as calls in other threads have ended. Later calls raise `ModelError`."""
        self._native_model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
