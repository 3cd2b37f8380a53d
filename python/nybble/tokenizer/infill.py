"""Prompts for filling in the middle: the text before and after a gap, between the model's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class InfillVocabulary(Protocol):
    """The part of a tokenizer that prompts for a gap need."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of a text."""

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a prompt, with the start token."""

    def id_of(self, text: str) -> int | None:
        """The id of the token with this spelling; None if there is none."""

    @property
    def adds_space(self) -> bool:
        """Whether `encode` puts a space before a text."""


@dataclass(frozen=True)
class InfillTokens:
    """The tokens around a gap, and their order."""

    prefix: int
    suffix: int
    middle: int | None = None
    suffix_first: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them. A completion ends before any."""
        return (self.prefix, self.suffix) if self.middle is None else (self.prefix, self.suffix, self.middle)


_SPELLINGS: tuple[tuple[str, str, str, bool], ...] = (
    # Before the gap, after it, at the gap; and whether the text after it comes first.
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", False),  # Qwen, CodeGemma, Granite 4
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", False),  # StarCoder, Granite Code, StableCode
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", False),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", False),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>", False),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>", False),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]", True),  # Codestral, whose prompts end with the text before the gap
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", True),  # Seed-Coder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", True),  # GLM, CodeGeeX
)
_KEYS = (
    ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
    ("prefix_token_id", "suffix_token_id", "middle_token_id"),
)
"""Keys of GGUF files, below `tokenizer.ggml`."""
_PROBE = "☺"
"""A character before a text that must not get a space."""


def find_infill_tokens(
    id_of: Callable[[str], int | None], metadata: Callable[[], Mapping[str, Any]]
) -> InfillTokens | None:
    """The tokens around a gap; None if a vocabulary has none.

    Args:
        id_of: Returns the id of a spelling.
        metadata: Returns the metadata of the GGUF file, which may take a while.
    """
    for before, after, at, suffix_first in _SPELLINGS:
        prefix, suffix, middle = id_of(before), id_of(after), id_of(at)
        if prefix is None or suffix is None:
            continue
        if before == "[PREFIX]":
            return InfillTokens(prefix, suffix, None, suffix_first)
        if middle is not None:
            return InfillTokens(prefix, suffix, middle, suffix_first)
    found = metadata()
    for keys in _KEYS:
        ids = [found.get(f"tokenizer.ggml.{key}") for key in keys]
        if all(isinstance(id, int) for id in ids):
            return InfillTokens(*ids)  # type: ignore[arg-type]
    return None


def infill_prompt(tokenizer: InfillVocabulary, tokens: InfillTokens, prefix: str, suffix: str) -> list[int]:
    """The token ids of a prompt whose completion fills the gap between two strings.

    Args:
        tokenizer: Encodes the strings. Special tokens that they spell out are plain characters.
        tokens: The tokens around the gap.
        prefix: The text before the gap.
        suffix: The text after it.
    """
    before = [tokens.prefix, *tokenizer.encode(prefix, add_special=False, parse_special=False)]
    after = [tokens.suffix, *_without_space(tokenizer, suffix)]
    parts: Sequence[list[int]] = (after, before) if tokens.suffix_first else (before, after)
    middle = [] if tokens.middle is None else [tokens.middle]
    return [*tokenizer.encode_prompt(""), *parts[0], *parts[1], *middle]


def _without_space(tokenizer: InfillVocabulary, text: str) -> list[int]:
    """The token ids of a text that continues another: without the space that some vocabularies add."""
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    if not tokenizer.adds_space:
        return ids
    probe = tokenizer.encode(_PROBE, add_special=False)
    probed = tokenizer.encode(_PROBE + text, add_special=False, parse_special=False)
    return probed[len(probe) :] if probed[: len(probe)] == probe else ids
