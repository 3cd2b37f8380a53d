"""Token sequences that spell a string within longer text, which DRY needs of the strings that end a repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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


def breaker_sequences(tokenizer: Vocabulary, breakers: Sequence[str]) -> list[list[int]]:
    """The shortest token sequences after which a text contains one of some strings.

    A token that contains a string is a sequence of its own. For a token that ends with the beginning of a string, the
    tokens of the rest follow, as in llama.cpp.

    Args:
        tokenizer: The tokenizer of the model.
        breakers: Strings that are not empty. They may be the spelling of special tokens.
    """
    wanted = [breaker.encode() for breaker in breakers]
    rests: dict[bytes, list[int]] = {}
    sequences = []
    for token in range(tokenizer.vocab_size):
        text = _spelling(tokenizer, token)
        if any(breaker in text for breaker in wanted):
            sequences.append([token])
            continue
        for breaker in wanted:
            for length in range(1, min(len(breaker), len(text) + 1)):
                if text.endswith(breaker[:length]):
                    rest = breaker[length:]
                    if rest not in rests:
                        rests[rest] = _tokens_within_text(tokenizer, rest)
                    if rests[rest]:
                        sequences.append([token, *rests[rest]])
    return sequences


def _spelling(tokenizer: Vocabulary, token: int) -> bytes:
    try:
        if token in tokenizer.special_ids:
            return tokenizer.token_text(token).encode()
        return tokenizer.token_bytes(token)
    except ValueError:  # An id between others that has no token.
        return b""


def _tokens_within_text(tokenizer: Vocabulary, rest: bytes) -> list[int]:
    """The tokens that spell the end of a text; empty where no text ends with them."""
    try:
        text = rest.decode()
    except UnicodeDecodeError:  # The string was cut within a character.
        return []
    # Many tokenizers encode the beginning of a text differently, such as with a space before it.
    for before in ("", "\n", "a"):
        ids = tokenizer.encode(before + text, add_special=False)
        spelled = b""
        for index in range(len(ids) - 1, -1, -1):
            spelled = _spelling(tokenizer, ids[index]) + spelled
            if spelled == rest:
                return ids[index:]
    return []
