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
        self._is_stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece. Returns the text that is certain, and whether a stop string was found."""
        if self._is_stopped:
            return "", True
        text = self._pending + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._is_stopped, self._pending = True, ""
            _, start = min(found)
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
