"""Tokenizers: encode text to token ids, and decode them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]

# Hidden from type checkers, so that they refuse misspelt names.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports `Tokenizer` at its first use: `nybble.Model` needs other modules of this package first."""
        if name in __all__:
            from nybble.tokenizer.tokenizer import Tokenizer

            globals()["Tokenizer"] = Tokenizer
            return Tokenizer
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
