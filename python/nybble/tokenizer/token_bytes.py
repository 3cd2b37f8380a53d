"""The bytes that the tokens of a vocabulary stand for."""

from __future__ import annotations

import re

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _bytes_of_characters()


def plain_bytes(token: str) -> bytes:
    """The bytes of a token that is written literally. Lone surrogates stand for bytes that were not UTF-8."""
    return token.encode("utf-8", "surrogateescape")


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. A token with characters outside GPT-2's table is taken literally."""
    try:
        return bytes([_BYTE_OF_CHARACTER[char] for char in token])
    except KeyError:
        return plain_bytes(token)


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token: a byte token (`<0x0A>`), or text in which U+2581 stands for a space."""
    if BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return plain_bytes(token.replace("\u2581", " "))
