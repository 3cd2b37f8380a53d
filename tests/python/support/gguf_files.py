"""Reads and writes GGUF files for tests: metadata keep their value types, tensors their bytes."""

from __future__ import annotations

import copy
import math
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32, F16, F64, BF16 = 0, 1, 28, 30
"""Types of tensors without blocks."""

_BYTES = {F32: 4, F16: 2, F64: 8, BF16: 2}


class Kind(IntEnum):
    """Type of a metadata value."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


_FORMATS = dict(zip(Kind, "BbHhIif?--Qqd", strict=True))

Value = tuple[Kind, Any]
"""A metadata value with its type. A string is bytes; an array is a pair of item type and items."""


def u32(number: int) -> Value:
    """Returns an unsigned 32-bit value."""
    return Kind.U32, number


def f32(number: float) -> Value:
    """Returns a single-precision value."""
    return Kind.F32, number


def boolean(value: bool) -> Value:
    """Returns a boolean value."""
    return Kind.BOOL, value


def text(value: str) -> Value:
    """Returns a string value."""
    return Kind.STRING, value.encode()


def array(kind: Kind, items: list[Any]) -> Value:
    """Returns an array value."""
    return Kind.ARRAY, (kind, items)


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored in the file. `shape` lists the fastest-varying dimension first."""

    shape: list[int]
    kind: int
    data: bytes

    @classmethod
    def of(cls, values: npt.NDArray[Any], kind: int = F32) -> Tensor:
        """Converts an array to F32 or F64. For any other type, stores the bytes of `values` unchanged."""
        values = values.astype({F32: "<f4", F64: "<f8"}.get(kind, values.dtype))
        return cls(list(values.shape[::-1]), kind, values.tobytes())

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The values of an F32 tensor."""
        found: npt.NDArray[np.float32] = np.frombuffer(self.data, "<f4").reshape(self.shape[::-1]).copy()
        return found


@dataclass
class File:
    """The metadata and tensors of a GGUF file."""

    metadata: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> File:
        """Reads a file that contains only tensor types without blocks."""
        reader = _Reader(path.read_bytes())
        _, tensors, keys = reader.number("I"), reader.number("Q"), reader.number("Q")
        file = cls()
        for _ in range(keys):
            key = reader.string().decode()
            kind = Kind(reader.number("I"))
            file.metadata[key] = kind, reader.value(kind)
        found = [reader.tensor() for _ in range(tensors)]
        begin = reader.at + -reader.at % 32
        for name, shape, stored, offset in found:
            size = math.prod(shape) * _BYTES[stored]
            file.tensors[name] = Tensor(shape, stored, reader.data[begin + offset : begin + offset + size])
        return file

    def copy(self) -> File:
        """Returns a deep copy."""
        return copy.deepcopy(self)

    def write(
        self,
        path: Path,
        *,
        version: int = 3,
        order: str = "<",
        alignment: int = 32,
        gap: int = 0,
        tail: bytes = b"",
        pad_end: bool = True,
    ) -> Path:
        """Writes the file.

        Args:
            path: file to write.
            version: format version.
            order: byte order, "<" or ">".
            alignment: alignment of tensor data; set `general.alignment` separately.
            gap: unused space between tensors, in units of the alignment.
            tail: bytes to append after the last tensor.
            pad_end: whether to pad the last tensor to the alignment.
        """
        out = bytearray(b"GGUF" + struct.pack(f"{order}IQQ", version, len(self.tensors), len(self.metadata)))
        for key, (kind, value) in self.metadata.items():
            out += _encoded(Kind.STRING, key.encode(), order) + struct.pack(f"{order}I", kind)
            out += _encoded(kind, value, order)
        data = bytearray()
        for name, tensor in self.tensors.items():
            data += bytes(-len(data) % alignment + (gap * alignment if data else 0))
            out += _encoded(Kind.STRING, name.encode(), order)
            out += struct.pack(
                f"{order}I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.kind, len(data)
            )
            data += tensor.data
        out += bytes(-len(out) % alignment) + data
        if pad_end:
            out += bytes(-len(out) % alignment)
        path.write_bytes(out + tail)
        return path


def _encoded(kind: Kind, value: Any, order: str) -> bytes:
    if kind is Kind.STRING:
        return struct.pack(f"{order}Q", len(value)) + bytes(value)
    if kind is Kind.ARRAY:
        item, items = value
        return struct.pack(f"{order}IQ", item, len(items)) + b"".join(_encoded(item, one, order) for one in items)
    return struct.pack(order + _FORMATS[kind], value)


@dataclass
class _Reader:
    data: bytes
    at: int = 4

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def string(self) -> bytes:
        length = int(self.number("Q"))
        self.at += length
        return self.data[self.at - length : self.at]

    def value(self, kind: Kind) -> Any:
        if kind is Kind.STRING:
            return self.string()
        if kind is Kind.ARRAY:
            item = Kind(self.number("I"))
            return item, [self.value(item) for _ in range(self.number("Q"))]
        return self.number(_FORMATS[kind])

    def tensor(self) -> tuple[str, list[int], int, int]:
        name = self.string().decode()
        shape = [self.number("Q") for _ in range(self.number("I"))]
        return name, shape, self.number("I"), self.number("Q")
