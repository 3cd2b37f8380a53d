"""Tokenizers: encode text to token ids, and decode them."""

from nybble.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
