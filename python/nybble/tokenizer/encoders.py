"""Text to token ids: what becomes of the vocabulary of a GGUF file or of a `tokenizer.json`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import Protocol

import tokenizers
from tokenizers import AddedToken, models

from nybble import _native
from nybble.errors import ModelError
from nybble.tokenizer.pretokenizers import PreTokenizer
from nybble.tokenizer.vocabulary import MARKS, TokenKind, Vocabulary, places


class Encoder(Protocol):
    """Turns text into ids, without the tokens that begin and end a text."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of `text`. Marks that are spelled out in it become their tokens only if `parse_special`."""


def is_failure(error: BaseException) -> bool:
    """Whether the package failed: it raises nothing particular, and over some files its code panics, no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


class PackageEncoder:
    """A tokenizer of the `tokenizers` package."""

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

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same tokenizer for text in which marks mean nothing: the package's switch for it is one for all threads.

        Both share the model, which is nearly all of it.
        """
        package = self.package
        literal = tokenizers.Tokenizer(package.model)
        if package.normalizer is not None:
            literal.normalizer = package.normalizer
        if package.pre_tokenizer is not None:
            literal.pre_tokenizer = package.pre_tokenizer
        added: Mapping[int, AddedToken] = package.get_added_tokens_decoder()
        literal.add_tokens([added[i] for i in sorted(added)])  # In this order they get the same ids again.
        literal.encode_special_tokens = True
        return literal


def build(vocabulary: Vocabulary) -> Encoder:
    """The encoder that the vocabulary of a GGUF file asks for."""
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
    """Cuts the text into words by the rule of the vocabulary, then applies its merges to the bytes of each."""
    ids = _writable(vocabulary)
    merges = vocabulary.merges
    parts, results = set(chain.from_iterable(merges)), map("".join, merges)
    if not (ids.keys() >= parts and all(map(ids.__contains__, results))):  # The package would panic.
        merges = [(a, b) for a, b in merges if a in ids and b in ids and a + b in ids]
        warnings.warn(
            f"tokenizer.ggml.merges: {len(vocabulary.merges) - len(merges)} of {len(vocabulary.merges)} merges are "
            "left out, since they join or make what is no token",
            stacklevel=2,
        )
    package = tokenizers.Tokenizer(models.BPE(dict(ids), list(merges), ignore_merges=rule.ignore_merges))
    package.pre_tokenizer = rule.build()
    drops_space = frozenset(vocabulary.drop_space_after)
    whole: list[AddedToken] = []
    for kind in (TokenKind.USER_DEFINED, *MARKS):
        for i in places(vocabulary.kinds, kind):
            if ids.get(text := vocabulary.tokens[i]) == i:
                whole.append(AddedToken(text, normalized=False, special=kind in MARKS, rstrip=i in drops_space))
    package.add_tokens(whole)
    return PackageEncoder(package)


def _writable(vocabulary: Vocabulary) -> Mapping[str, int]:
    """The tokens that a text can contain: none that is empty or holds bytes that are no UTF-8."""
    ids = vocabulary.ids
    if "" in ids:
        ids = {text: i for text, i in ids.items() if text}
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        return {text: i for text, i in ids.items() if not _has_surrogate(text)}
    return ids


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
