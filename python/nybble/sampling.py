"""How the next token is chosen and when to stop: every option of generation, defined once."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from nybble.constraint import schema_text

if TYPE_CHECKING:
    from typing_extensions import Unpack


_LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest number in single precision, with which is computed."""


def _doc(text: str) -> dict[str, str]:
    """The metadata of a field: its help, which the command line shows as well."""
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of `generate`, `stream` and `chat`; each of them may also be given there by name.

    The steps apply in this order: logit_bias, penalties, top_k, typical_p, top_p, min_p, temperature, then one draw.
    """

    temperature: float = field(
        default=0.8, metadata=_doc("Spread of the choice: 0 always takes the likeliest token, 1 samples as trained.")
    )
    top_k: int = field(default=40, metadata=_doc("Keep the K likeliest tokens; 0 keeps all."))
    top_p: float = field(
        default=0.95, metadata=_doc("Keep the likeliest tokens that together reach this probability; 1 keeps all.")
    )
    min_p: float = field(
        default=0.05, metadata=_doc("Drop tokens less likely than this share of the likeliest one; 0 keeps all.")
    )
    typical_p: float = field(
        default=1.0, metadata=_doc("Keep the most typical tokens that together reach this probability; 1 keeps all.")
    )
    repetition_penalty: float = field(
        default=1.0, metadata=_doc("Divide the logits of tokens seen before by this (multiply negative ones); 1: off.")
    )
    presence_penalty: float = field(default=0.0, metadata=_doc("Subtract this from the logits of tokens seen before."))
    frequency_penalty: float = field(
        default=0.0, metadata=_doc("Subtract this from the logits of tokens seen before, once for each time.")
    )
    penalty_window: int = field(
        default=64, metadata=_doc("How many of the last tokens, prompt and text alike, the penalties look at; 0: all.")
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata=_doc("Add to the logits of token ids; -inf forbids a token.")
    )
    seed: int | None = field(
        default=None, metadata=_doc("Same seed, same text; without one every call draws a new one.")
    )
    max_tokens: int | None = field(
        default=256, metadata=_doc("Stop after so many new tokens; None goes on until the context is full.")
    )
    stop: str | Sequence[str] = field(
        default=(), metadata=_doc("Stop before any of these strings; they are not part of the text.")
    )
    logprobs: int | None = field(
        default=None, metadata=_doc("Report the log-probability of each token and of so many likeliest alternatives.")
    )
    schema: Mapping[str, Any] | type | str | None = field(
        default=None,
        metadata=_doc("Write a JSON text that follows this JSON Schema: a dict, JSON text or a pydantic model."),
    )
    regex: str | None = field(default=None, metadata=_doc("Write a text that this regular expression matches."))
    grammar: str | None = field(
        default=None, metadata=_doc("Write a text of this context-free grammar (Lark, as llguidance understands it).")
    )

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _finite(self.temperature) and self.temperature >= 0, "0 or more")
        for name in ("top_k", "penalty_window"):
            value = getattr(self, name)
            _check(name, value, _whole(value) and 0 <= value < 2**32, "a whole number, 0 or more")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _check(name, value, _finite(value) and 0 < value <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, _finite(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _finite(penalty) and penalty > 0, "more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), _finite(getattr(self, name)), "a finite number")
        _check("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            fits = _whole(token) and 0 <= token < 2**32 and _number(bias) and (_finite(bias) or bias == -math.inf)
            _check("logit_bias", {token: bias}, fits, "token ids with finite numbers or -inf")
        _check("seed", self.seed, self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**64), "0 to 2**64 - 1")
        for name in ("max_tokens", "logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or (_whole(value) and 0 <= value < 2**32), "None, or 0 or more")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        _check("stop", self.stop, all(map(_text, stop)), "strings that are not empty")
        object.__setattr__(self, "stop", stop)
        if self.schema is not None:
            object.__setattr__(self, "schema", schema_text(self.schema))
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        _check(" and ".join(given), "each of them", len(given) <= 1, "at most one of schema, regex and grammar")
        for name in given:
            _check(name, getattr(self, name), _text(getattr(self, name)), "a string that is not empty")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def replace(self, **overrides: Unpack[SamplingOverrides]) -> SamplingOptions:
        """A copy with some options changed."""
        return dataclasses.replace(self, **overrides)


class SamplingOverrides(TypedDict, total=False):
    """The names and types of `SamplingOptions`, for type checkers: Python cannot derive one from the other."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int
    logit_bias: Mapping[int, float]
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    schema: Mapping[str, Any] | type | str | None
    regex: str | None
    grammar: str | None


def merge(options: SamplingOptions | None, overrides: SamplingOverrides) -> SamplingOptions:
    """`options`, or the defaults, with single options replaced. An unknown name is a `TypeError` listing the known."""
    known = SamplingOverrides.__annotations__
    if unknown := [name for name in overrides if name not in known]:
        raise TypeError(f"no such option: {', '.join(unknown)} (options: {', '.join(known)})")
    base = SamplingOptions() if options is None else options
    return base.replace(**overrides) if overrides else base


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    # Whole numbers beyond every float are finite, and would be an OverflowError in what asks.
    return _number(value) and -_LARGEST <= value <= _LARGEST


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
