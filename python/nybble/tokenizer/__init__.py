"""Tokenizers: text to token ids and back."""

from nybble.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
