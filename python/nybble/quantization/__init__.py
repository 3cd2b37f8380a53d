"""Quantization to 4 bits, calibration text, evaluation, and reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.quantization.api import quantize

__all__ = ["quantize"]


def __getattr__(name: str) -> Any:
    """Imports `quantize` at its first use, because modules of this package are used without it."""
    if name in __all__:
        from nybble.quantization.api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
