"""A text that goes on: what was read and written stays in the cache, and can be kept in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from nybble import _native
from nybble.generation import Completion, TextStream, Writer
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.model import Model


class Session:
    """One text over a model: each call adds to it, and computes only what is new.

    `Model.session` begins one, `Model.load_session` reads one from a file. One thread at a time may use a session; any
    number may use the model. What it writes has the same bits as one long text would have.
    """

    def __init__(self, model: Model, native: _native.Session, tokens: Sequence[int] = ()) -> None:
        self._model = model
        self._native = native
        self._tokens = tuple(tokens)
        self._writer: Writer | None = None
        """What adds to the text now, or did so last."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the whole text, read and written."""
        if self._writer is None:
            return self._tokens
        return (*self._tokens, *self._writer.tokens)

    @property
    def text(self) -> str:
        """The whole text, read and written, without marks."""
        return self._model.detokenize(self.tokens)

    def generate(
        self,
        prompt: str | Sequence[int] = "",
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion:
        """Adds to the text and has the model continue it. What the model writes belongs to the text from then on.

        Args:
            prompt: what to add, as text or as token ids; the model simply goes on where it is empty. A text is
                tokenized by itself, with the model's start token only where the session is empty.
            options: as in `Model.generate`.
            **overrides: as in `Model.generate`.

        Raises:
            ContextFullError: the text does not fit into the context. It is then as it was before.
        """
        return self._finished(self._begin(self._extended(prompt), merge(options, overrides)))

    def stream(
        self,
        prompt: str | Sequence[int] = "",
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream:
        """As `generate`, piece by piece. Of a stream that is left early, what it has written belongs to the text."""
        return self._begin(self._extended(prompt), merge(options, overrides))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[False] = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[True],
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: SamplingOptions | None = None,
        *,
        stream: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream:
        """Answers a conversation as `Model.chat` does, but reads only what the session has not seen of it.

        The text becomes that of the conversation: what the session held beyond their common beginning is dropped.
        """
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        begun = self._begin(ids, merge(options, overrides))
        return begun if stream else self._finished(begun)

    def fork(self) -> Session:
        """Another session with the same text, which goes on by itself. The memory of what they share is shared."""
        return Session(self._model, self._seen(), self.tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the text and what the model has computed of it to a file, for `Model.load_session`.

        The file is replaced when the new one is whole. Only the user may read it: it tells what was said.

        Raises:
            OSError: the file cannot be written.
        """
        self._seen().save(self._model._native, self.tokens, path)

    def __len__(self) -> int:
        """How many tokens the text has."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<Session of {len(self)} tokens over {self._model!r}>"

    def _extended(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of the whole text with `prompt` behind it."""
        held = self.tokens
        if not isinstance(prompt, str):
            return [*held, *prompt]
        if held:
            return [*held, *self._model.tokenize(prompt, add_special=False)]
        return self._model._prompt_ids(prompt)

    def _begin(self, ids: Sequence[int], options: SamplingOptions) -> TextStream:
        """Starts to continue `ids`, of which the session may have seen a beginning."""
        model = self._model._native
        held, common = self.tokens, 0
        while common < min(len(held), len(ids)) and held[common] == ids[common]:
            common += 1
        seen = self._seen().prefix(common)
        writer = Writer(model, self._model.tokenizer, ids, options, self._model.info.context, session=seen)
        # Only now, when nothing can fail any more, the text is another one.
        self._native, self._tokens, self._writer = seen, tuple(ids), writer
        return TextStream(model, writer)

    def _finished(self, stream: TextStream) -> Completion:
        for _ in stream:
            pass
        return stream.completion

    def _seen(self) -> _native.Session:
        """Keys and values of a beginning of the text."""
        if self._writer is not None:
            # The token that ended the text, if one did, was sampled but never fed.
            self._tokens, self._native = self.tokens, _native.Session.of(self._writer.sequence)
            self._writer = None
        return self._native
