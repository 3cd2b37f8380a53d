"""Token sequences that spell a string within longer text, which DRY needs of the strings that end a repetition."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

_MAX_BYTES = 40
"""Bytes of a string that count, as in llama.cpp. Longer strings are cut."""
_MAX_TAIL = 20
"""Tokens after the first one of a sequence, as in llama.cpp."""


class Vocabulary(Protocol):
    """The part of a tokenizer that the search for token sequences needs."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""

    @property
    def special_ids(self) -> frozenset[int]:
        """All special tokens."""

    def token_text(self, token: int) -> str:
        """The spelling of a token."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text."""


class Breakers:
    """Finds token sequences in the vocabulary of a tokenizer."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._spellings = [_spelling(tokenizer, token) for token in range(tokenizer.vocab_size)]

    def sequences(self, breakers: Sequence[str]) -> list[list[int]]:
        """The shortest token sequences after which a text contains one of some strings.

        A token that contains a string is a sequence of its own. For a token that ends with the beginning of a string,
        the tokens of the rest follow, as in llama.cpp.

        Args:
            breakers: Strings that are not empty. They may be the spelling of special tokens.
        """
        wanted = sorted({breaker.encode()[:_MAX_BYTES] for breaker in breakers})
        if not wanted:
            return []
        contains = re.compile(b"|".join(map(re.escape, wanted))).search
        rests: dict[bytes, list[list[int]]] = defaultdict(list)
        for breaker in wanted:
            for length in range(1, len(breaker)):
                if tail := self._tokens_within_text(breaker[length:]):
                    rests[breaker[:length]].append(tail)
        longest = max(map(len, rests), default=0)
        found = []
        for token, text in enumerate(self._spellings):
            if contains(text):
                found.append([token])
            else:
                for length in range(1, min(longest, len(text)) + 1):
                    found += [[token, *tail] for tail in rests.get(text[-length:], ())]
        return found

    def _tokens_within_text(self, rest: bytes) -> list[int]:
        """The tokens that spell the end of a text; empty where no text ends with them."""
        try:
            text = rest.decode()
        except UnicodeDecodeError:  # The string was cut within a character.
            return []
        # Many tokenizers encode the beginning of a text differently, such as with a space before it.
        for before in ("", "\n", "a"):
            ids = self._tokenizer.encode(before + text, add_special=False)
            spelled = b""
            for index in range(len(ids) - 1, -1, -1):
                spelled = self._spellings[ids[index]] + spelled
                if spelled == rest:
                    return ids[index:] if len(ids) - index <= _MAX_TAIL else []
        return []


def _spelling(tokenizer: Vocabulary, token: int) -> bytes:
    try:
        if token in tokenizer.special_ids:
            return tokenizer.token_text(token).encode()
        return tokenizer.token_bytes(token)
    except ValueError:  # An id between others that has no token.
        return b""
