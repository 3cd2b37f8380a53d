"""`Session`: a sequence that keeps its KV cache between calls, and in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nybble import _native as native_module
from nybble.completion import Completion, Prompt
from nybble.errors import ModelError
from nybble.generation.chatting import Chatting
from nybble.generation.request import TextModel, prepare_tokens, prompt_ids, token_ids
from nybble.generation.stream import TextStream
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.tokenizer.tokenizer import Tokenizer


class Session(Chatting):
    """A sequence of prompts and completions. Each call appends to it and computes only the new tokens.

    `Model.session` returns an empty session, `Model.load_session` reads one from a file. One thread at a time may use a
    session; any number may use the model. Completions are bit-identical to those of one long prompt.

    Example:
        ```python
        session = model.session()
        session.generate("Once upon a time", max_tokens=32)
        session.save("story.session")
        other = session.fork()
        print(session.generate(" Suddenly,", max_tokens=32))
        print(other.generate(" Meanwhile,", max_tokens=32))

        later = model.load_session("story.session")
        ```
    """

    _returned_by = "Model.session() or Model.load_session(...)"
    _instead_of_pickling = "save it, and call Model.load_session in the other process"
    _model: TextModel
    _native: native_module.Session
    """The KV cache of a beginning of `_tokens`."""
    _tokens: tuple[int, ...]
    """All tokens before the latest completion."""
    _stream: TextStream | None
    """The latest completion, unless `_tokens` includes it."""
    _before: tuple[native_module.Session, tuple[int, ...]]
    """KV cache and tokens before the latest completion."""

    @classmethod
    def _of(cls, model: TextModel, native: native_module.Session, tokens: Sequence[int] = ()) -> Session:
        session = cls.__new__(cls)
        session._model, session._native, session._tokens, session._stream = model, native, tuple(tokens), None
        session._before = native, session._tokens
        return session

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of all tokens, prompts and completions."""
        self._undo_failed()
        if self._stream is None:
            return self._tokens
        return (*self._tokens, *self._stream.tokens)

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that all tokens are computed with, None for the model alone.

        Calls may name it again, but no other.
        """
        return self._native.adapter or None

    @property
    def text(self) -> str:
        """The text of all tokens, without special tokens."""
        return self._model.tokenizer.decode(self.tokens)

    def generate(
        self,
        prompt: Prompt = "",
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion:
        """Appends a prompt, generates its completion and appends the completion.

        Args:
            prompt: Text or token ids to append. If empty, the model continues the session. Text is tokenized by itself,
                with the model's start token only if the session is empty.
            options: As in `Model.generate`.
            **overrides: As in `Model.generate`.

        Raises:
            ModelError: The model cannot compute the tokens, for example because they do not fit into the context
                (`ContextFullError`), or their keys or values do not fit into the cache type. The session is unchanged.
            MemoryError: The KV cache does not fit into memory. The session keeps the prompt and the tokens so far.
        """
        return self._finished(self._begin(self._extended(prompt), merge(options, overrides)))

    def stream(
        self,
        prompt: Prompt = "",
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream:
        """Appends a prompt and generates its completion piece by piece.

        If the stream is abandoned, the session keeps the tokens so far. Raises as `generate` does; the iterator
        raises errors of the computation, with the same effect on the session.
        """
        return self._begin(self._extended(prompt), merge(options, overrides))

    def _next_turn(self, prompt: str, options: SamplingOptions, *, stream: bool) -> Completion | TextStream:
        begun = self._begin(self._tokenizer.encode_prompt(prompt), options, separates=True)
        return begun if stream else self._finished(begun)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def fork(self) -> Session:
        """Returns an independent session with the same tokens. Both share the memory of these tokens."""
        return Session._of(self._model, self._computed(), self.tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens and their KV cache to a file, for `Model.load_session`.

        An existing file is replaced once the new one is complete. Only the user may read the file, because it contains
        the conversation.

        Raises:
            OSError: The file cannot be written.
            ValueError: `path` is a file of the model, or is not a regular file.
        """
        native_module.check_output(path, [self._model._source])
        self._model._native.save_session(self._computed(), self.tokens, path)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<Session of {len(self)} tokens over {self._model!r}>"

    def _extended(self, prompt: Prompt) -> Sequence[int]:
        """Returns all tokens with those of `prompt` appended."""
        tokens, tokenizer = self.tokens, self._model.tokenizer
        if not isinstance(prompt, str):
            return [*tokens, *token_ids(prompt, "prompt")]
        if tokens:
            return [*tokens, *tokenizer.encode(prompt, add_special=False)]
        return prompt_ids(tokenizer, prompt)

    def _begin(self, ids: Sequence[int], options: SamplingOptions, *, separates: bool = False) -> TextStream:
        """Starts the completion of `ids`. Keys and values of their common prefix with the session are reused."""
        tokens, common = self.tokens, 0
        while common < min(len(tokens), len(ids)) and tokens[common] == ids[common]:
            common += 1
        before = self._computed()
        native = before.prefix(common)
        request = prepare_tokens(self._model, ids, options, native)
        stream = TextStream._of(self._model, request, keep_session=True, separates=separates)
        # The session changes only here, after everything that can fail.
        self._before = before, tuple(tokens)
        self._native, self._tokens, self._stream = native, tuple(ids), stream
        return stream

    def _finished(self, stream: TextStream) -> Completion:
        for _ in stream:
            pass
        self._computed()  # Without the stream its scheduler and buffers are freed.
        return stream.completion

    def _undo_failed(self) -> None:
        """Restores the session as it was before a completion that the model could not compute."""
        if self._stream is not None and isinstance(self._stream._error, ModelError):
            (self._native, self._tokens), self._stream = self._before, None

    def _computed(self) -> native_module.Session:
        """Returns the KV cache of a beginning of `tokens`. The tokens of the latest stream become the session's own."""
        self._undo_failed()
        if self._stream is not None:
            tokens, native = self.tokens, self._stream._session
            if native is not None:
                self._native = native.prefix(len(tokens))
            self._tokens, self._stream = tokens, None
        return self._native
