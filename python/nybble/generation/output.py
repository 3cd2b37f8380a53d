"""Turns the tokens of a completion into text: decodes them, tells reasoning from the answer, finds stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.chat.reasoning_splitter import OutputPart
from nybble.tokenizer.detokenizer import SpecialStops, StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from nybble.chat.reasoning_splitter import Splitter
    from nybble.generation.request import PreparedRequest


class OutputText:
    """The text of one completion, as its tokens come.

    Args:
        request: The request.
        separates: Whether reasoning comes as parts of its own, without its markers. Otherwise all text is content.
    """

    def __init__(self, request: PreparedRequest, *, separates: bool) -> None:
        self._decoder = StreamDecoder(request.tokenizer, after=request.prompt)
        self._specials = SpecialStops(request.tokenizer, request.options.stop or ())
        self._stops = StopMatcher(self._specials.stops)
        self._splitter: Splitter | None = None if request.watch is None else request.watch.splitter
        self._separates = separates and self._splitter is not None
        self._held = ""
        """Text that may be reasoning, where stop strings do not count."""

    def push(self, token: int, *, stops: bool) -> tuple[list[OutputPart], bool]:
        """Takes a token. Returns the parts that are final now, and whether a stop string was found.

        Args:
            token: The token.
            stops: Whether stop strings count.
        """
        text = self._decoder.push(token)
        if self._splitter is None:
            return self._content(text + self._specials.of(token), stops)
        was_reasoning = self._splitter.is_reasoning
        parts = self._splitter.push(text, (token,))
        if self._separates:
            return self._answered(parts, self._specials.of(token), stops)
        self._held += text + self._specials.of(token)
        if self._splitter.is_undecided and not self._splitter.has_answered:
            return [], False
        held, self._held = self._held, ""
        return self._content(held, stops and not (was_reasoning or self._splitter.is_reasoning))

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, as it was given."""
        found = self._stops.found
        return None if found is None else self._specials.spelled(found)

    def finish(self) -> tuple[list[OutputPart], bool]:
        """The rest at the end: the bytes of an incomplete character, and what may have become a stop string."""
        text = self._decoder.finish()
        if self._splitter is not None and self._separates:
            parts, hit = self._answered([*self._splitter.push(text), *self._splitter.finish()], "", True)
        else:
            held, self._held = self._held, ""
            parts, hit = self._content(held + text, True)
        return (parts, True) if hit else ([*parts, *self._visible(self._stops.finish())], False)

    def _answered(self, parts: list[OutputPart], placeholder: str, stops: bool) -> tuple[list[OutputPart], bool]:
        """Reasoning as it is, and the content of `parts` up to a stop string."""
        kept: list[OutputPart] = []
        if placeholder and not any(part.kind == "content" for part in parts):
            parts = [*parts, OutputPart("content", "")]
        for part in parts:
            if part.kind == "reasoning":
                kept.append(part)
                continue
            found, hit = self._content(placeholder + part.text, stops)
            if part.tokens:  # Also if their text is held back.
                found = [OutputPart("content", "".join(each.text for each in found), part.tokens)]
            kept += found
            placeholder = ""
            if hit:
                return kept, True
        return kept, False

    def _content(self, text: str, stops: bool) -> tuple[list[OutputPart], bool]:
        text, hit = self._stops.push(text) if stops else (text, False)
        return self._visible(text), hit

    def _visible(self, text: str) -> list[OutputPart]:
        text = self._specials.visible(text)
        return [OutputPart("content", text)] if text else []
