"""The encoder of the `tokenizers` package, for vocabularies that nybble's own code does not encode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import tokenizers
from tokenizers import AddedToken, models

from nybble.errors import ModelError


def _is_failure(error: BaseException) -> bool:
    """Whether an error comes from the `tokenizers` package.

    It raises plain `Exception`, and its Rust code panics on some files, which is not an `Exception`.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


class PackageEncoder:
    """An encoder of the `tokenizers` package.

    Args:
        text: The content of a `tokenizer.json`.

    Raises:
        ValueError: The package cannot use it.
    """

    def __init__(self, text: str) -> None:
        try:
            self.package: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            if isinstance(error, Exception) or _is_failure(error):
                raise ValueError(str(error)) from error
            raise
        self.package.no_truncation()  # Files may be saved with settings for batches of equal length.
        self.package.no_padding()
        if isinstance(self.package.model, models.BPE):
            self.package.model.dropout = None  # Dropout skips random merges, which is for training.
        try:
            self.package.encode("a")
        except BaseException as error:
            if _is_failure(error):
                raise ValueError(f"it cannot encode the text 'a': {error}") from error
            raise

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of `text`, without start and end tokens.

        Special tokens spelled out in it are recognized only if `parse_special`.
        """
        package = self.package if parse_special else self._literal
        try:
            return list(package.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if _is_failure(error):
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
        return longest, bytes(byte for byte, char in enumerate(_byte_level_alphabet()) if char not in pieces)

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


def _byte_level_alphabet() -> list[str]:
    """The characters that stand for bytes in byte-level vocabularies, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
