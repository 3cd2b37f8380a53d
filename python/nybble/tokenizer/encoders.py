"""Encoders of text to token ids, built from the vocabulary of a GGUF file or from a `tokenizer.json`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import Protocol

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from nybble import _native
from nybble.errors import ModelError
from nybble.tokenizer.pretokenizers import PreTokenizer
from nybble.tokenizer.token_bytes import byte_level_bytes
from nybble.tokenizer.vocabulary import SPECIAL_KINDS, TokenKind, Vocabulary, ids_of_kinds


class Encoder(Protocol):
    """Encodes text to ids, without start and end tokens."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of `text`. Special tokens spelled out in it are recognized only if `parse_special`."""


def is_failure(error: BaseException) -> bool:
    """Whether an error comes from the `tokenizers` package.

    It raises plain `Exception`, and its Rust code panics on some files, which is not an `Exception`.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


class PackageEncoder:
    """An encoder of the `tokenizers` package."""

    def __init__(self, package: tokenizers.Tokenizer) -> None:
        self.package = package

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """See `Encoder`."""
        package = self.package if parse_special else self._literal
        try:
            return list(package.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if is_failure(error):
                raise ModelError(f"the vocabulary cannot encode {text!r:.60} ({error})") from error
            raise

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, without encoding it; 0 where none is known."""
        if self._coverage is None:
            return 0
        longest, uncovered = self._coverage
        return len(text.encode("utf-8", "replace").translate(None, uncovered)) // longest

    @cached_property
    def _coverage(self) -> tuple[int, bytes] | None:
        """The most bytes of a text that a token covers, and the bytes that none covers.

        None if a token may cover more bytes than it has.
        """
        package = self.package
        added: Mapping[int, AddedToken] = package.get_added_tokens_decoder()
        trims = any(token.lstrip or token.rstrip for token in added.values())
        if package.normalizer is not None or trims or not isinstance(package.model, models.BPE):
            return None
        pieces = package.get_vocab(with_added_tokens=False)
        # A character stands for a byte in these vocabularies, but for itself in added tokens.
        longest = max([*map(len, pieces), *(len(token.content.encode()) for token in added.values())])
        covered = {byte_level_bytes(char) for char in pre_tokenizers.ByteLevel.alphabet() if char in pieces}
        return longest, bytes(byte for byte in range(256) if bytes([byte]) not in covered)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same tokenizer without special tokens. The package's own switch for that affects all threads.

        Both tokenizers share the model, which takes nearly all of the memory.
        """
        package = self.package
        literal = tokenizers.Tokenizer(package.model)
        if package.normalizer is not None:
            literal.normalizer = package.normalizer
        if package.pre_tokenizer is not None:
            literal.pre_tokenizer = package.pre_tokenizer
        added: Mapping[int, AddedToken] = package.get_added_tokens_decoder()
        literal.add_tokens([added[i] for i in sorted(added)])  # This order gives them the same ids.
        literal.encode_special_tokens = True
        return literal


def build(vocabulary: Vocabulary) -> Encoder:
    """The encoder for the vocabulary of a GGUF file."""
    if vocabulary.pre_tokenizer is not None:
        return _byte_level(vocabulary, vocabulary.pre_tokenizer)
    return _native.SentencePiece(
        list(vocabulary.tokens),
        vocabulary.scores,
        vocabulary.kinds,
        add_space_prefix=vocabulary.add_space_prefix,
        unknown=vocabulary.unknown_id,
        drop_space_after=vocabulary.drop_space_after,
    )


def _byte_level(vocabulary: Vocabulary, rule: PreTokenizer) -> PackageEncoder:
    """An encoder that splits the text into words and applies the vocabulary's merges to the bytes of each word."""
    ids = _encodable(vocabulary)
    merges = vocabulary.merges
    parts, results = set(chain.from_iterable(merges)), map("".join, merges)
    if not (ids.keys() >= parts and all(map(ids.__contains__, results))):  # The package panics on such merges.
        merges = [(a, b) for a, b in merges if a in ids and b in ids and a + b in ids]
        warnings.warn(
            f"tokenizer.ggml.merges: {len(vocabulary.merges) - len(merges)} of {len(vocabulary.merges)} merges are "
            "ignored, since their parts or results are not tokens",
            stacklevel=2,
        )
    package = tokenizers.Tokenizer(models.BPE(dict(ids), list(merges), ignore_merges=rule.ignore_merges))
    package.pre_tokenizer = rule.build()
    drops_space = frozenset(vocabulary.drop_space_after)
    added: list[AddedToken] = []
    for kind in (TokenKind.USER_DEFINED, *SPECIAL_KINDS):
        for i in ids_of_kinds(vocabulary.kinds, kind):
            if ids.get(text := vocabulary.tokens[i]) == i:
                added.append(AddedToken(text, normalized=False, special=kind in SPECIAL_KINDS, rstrip=i in drops_space))
    package.add_tokens(added)
    return PackageEncoder(package)


def _encodable(vocabulary: Vocabulary) -> Mapping[str, int]:
    """The tokens that can occur in a text: those that are neither empty nor invalid UTF-8."""
    ids = vocabulary.ids
    if "" in ids:
        ids = {text: i for text, i in ids.items() if text}
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        return {text: i for text, i in ids.items() if not _has_surrogate(text)}
    return ids


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
