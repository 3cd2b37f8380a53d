"""Decodes token ids to text one at a time, and finds stop strings in the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenSource(Protocol):
    """The part of a tokenizer that decoding needs."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which decode to no text."""

    @property
    def adds_space(self) -> bool:
        """Whether encoding puts a space before each text, which decoding removes."""


class SpecialTokens(Protocol):
    """The part of a tokenizer that finds special tokens in stop strings."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text."""

    def token_text(self, token: int) -> str:
        """The spelling of a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens."""


_PLACEHOLDERS = 0xD800
"""The first of 2048 lone surrogates, which no decoded text contains."""


class StreamDecoder:
    """Decodes token ids one at a time. The joined pieces equal `Tokenizer.decode` of all ids.

    Args:
        tokenizer: The tokenizer of the ids.
        after: The ids that the text continues, such as the prompt. If the vocabulary puts a space before each text,
            decoding removes it only at the start of a text: at the very beginning or after a special token.
    """

    def __init__(self, tokenizer: TokenSource, after: Sequence[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._special_ids = tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.adds_space and (not after or after[-1] in self._special_ids)

    def push(self, token: int) -> str:
        """The text that this token completes: whole characters only, and none for a special token."""
        if token in self._special_ids:
            return ""
        piece = self._token_bytes(token)
        if self._drops_space and piece:
            self._drops_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """The remaining text: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


class SpecialStops:
    """Stop strings in which special tokens count, although they decode to no text.

    Each special token in them gets a placeholder, a lone surrogate, which no text contains. A matcher finds the
    placeholders in the text, and `visible` removes them.

    Args:
        tokenizer: The tokenizer of the text.
        stops: The stop strings. Each also counts as plain text.
    """

    def __init__(self, tokenizer: SpecialTokens, stops: Sequence[str]) -> None:
        self._placeholders: dict[int, str] = {}
        self._spelled: dict[str, str] = {}
        for stop in stops:
            written = self._with_placeholders(tokenizer, stop)
            self._spelled |= {stop: stop, written: stop}
        self.stops: tuple[str, ...] = tuple(self._spelled)

    def spelled(self, stop: str) -> str:
        """One of `stops` as it was given."""
        return self._spelled[stop]

    def of(self, token: int) -> str:
        """The placeholder of a token; empty for every token that no stop string contains."""
        return self._placeholders.get(token, "")

    def visible(self, text: str) -> str:
        """A text without placeholders."""
        if not self._placeholders:
            return text
        return text.translate({ord(char): None for char in self._placeholders.values()})

    def _with_placeholders(self, tokenizer: SpecialTokens, stop: str) -> str:
        written = ""
        at = 0
        ids = tokenizer.encode(stop, add_special=False)
        for token in ids if tokenizer.special_ids.intersection(ids) else ():
            text = tokenizer.token_text(token)
            if token not in tokenizer.special_ids or (start := stop.find(text, at)) < 0:
                continue
            char = self._placeholders.setdefault(token, chr(_PLACEHOLDERS + len(self._placeholders)))
            written += stop[at:start] + char
            at = start + len(text)
        return written + stop[at:]


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and holds back only what may become one.

    The text ends as soon as a stop string is complete, however the text is split into pieces. If several are complete
    at once, the longest counts. The stop string is not part of the text.

    Args:
        stops: The stop strings.

    Raises:
        TypeError: `stops` is a string.
        ValueError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise TypeError("stop: found a string, expected a list of strings")
        if not all(stops):
            raise ValueError("stop: found an empty string, expected strings of at least one character")
        self._stops = tuple(stops)
        self._pending = ""
        self.found: str | None = None
        """The stop string that has ended the text."""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece. Returns the text that is certain, and whether a stop string was found."""
        if self.found is not None:
            return "", True
        text = self._pending + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.found, self._pending = text[start:end], ""
            return text[:start], True
        split = len(text) - self._possible_start(text)
        self._pending = text[split:]
        return text[:split], False

    def finish(self) -> str:
        """The text that was held back, at the end of the text."""
        pending, self._pending = self._pending, ""
        return pending

    def _possible_start(self, text: str) -> int:
        """The number of characters at the end of `text` that may start a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
