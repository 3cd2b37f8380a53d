"""Token ids back to text, as a whole or as they come, and the watch for stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.tokenizer.tokenizer import Tokenizer


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()


def plain_bytes(token: str) -> bytes:
    """The bytes of a token that is written as it is. Those that were no UTF-8 came as lone surrogates."""
    return token.encode("utf-8", "surrogateescape")


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with letters that stand for no byte is taken as it is written."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return plain_bytes(token)


def piece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token."""
    return plain_bytes(token.replace("\u2581", " "))


class StreamDecoder:
    """Turns token ids into text as they come. The pieces joined are what `Tokenizer.decode` gives for all ids.

    Args:
        tokenizer: whose tokens they are.
        after: the ids that the text continues, such as the prompt. Vocabularies that put a space before every text
            lose it again only where a text begins: at the very start or after a mark.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._bytes_of: Callable[[int], bytes] = tokenizer.token_bytes
        self._marks = tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.adds_space and (not after or after[-1] in self._marks)

    def push(self, token: int) -> str:
        """The text that became whole with this token: whole characters only, none for a mark."""
        if token in self._marks:
            return ""
        piece = self._bytes_of(token)
        if self._drops_space and piece:
            self._drops_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What remains: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Watches a text for stop strings as it comes, and holds back only what may still become one.

    The text ends as soon as any stop string is complete, wherever the borders of the pieces lie; of several that are
    complete at once the longest counts. The stop string itself is not given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise TypeError("stop: found a string, expected a list of strings")
        if not all(stops):
            raise ValueError("stop: found an empty string, expected strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece. Returns what is safe to print, and whether a stop string has been met."""
        if self._hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._hit, self._held = True, ""
            _, start = min(found)
            return text[:start], True
        split = len(text) - self._possible_start(text)
        self._held = text[split:]
        return text[:split], False

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """How many characters at the end of `text` may be the start of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
