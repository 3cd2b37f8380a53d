"""`SamplingOptions`: how to sample tokens and when to stop, for Python, the command line and the server."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

from nybble.overrides import chosen, doc

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    LogitsProcessor = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.ArrayLike | None]
    """A function of tokens and logits that returns logits: see `SamplingOptions.logits_processor`."""
else:
    # Importing NumPy takes longer than everything else here.
    LogitsProcessor = Callable[[Any, Any], Any]


DRY_BREAKERS = ("\n", ":", '"', "*")
"""The default of `SamplingOptions.dry_sequence_breakers`."""

MAX_BEAMS = 256
"""The largest number of beams of a search."""

_LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest finite number in single precision, which the sampler uses."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of `generate`, `stream` and `chat`, which also take each of them by name.

    A sampler applies them in this order: `logits_processor`, `logit_bias`, penalties, DRY, `top_n_sigma`, `top_k`,
    `typical_p`, `top_p`, `min_p`, XTC, `temperature`. Then it draws one token. Mirostat replaces the filters from
    `top_n_sigma` to XTC. With `num_beams` over 1, a beam search replaces sampling.

    Raises:
        ValueError: An option is out of range. The message names it, its value and what is expected.

    Example:
        ```python
        options = SamplingOptions(temperature=0.7, top_p=0.9, seed=1, max_tokens=100)
        model.generate("Once upon a time", options)
        model.generate("Once upon a time", options, seed=2)
        model.generate("A user as JSON:", schema={"type": "object", "properties": {"name": {"type": "string"}}})
        ```
    """

    temperature: float = field(
        default=0.8, metadata=doc("Randomness: 0 always takes the most likely token, 1 samples as trained.")
    )
    """Randomness: 0 always takes the most likely token (greedy), 1 samples the model's own distribution."""
    top_k: int = field(default=40, metadata=doc("Keep the K most likely tokens; 0 keeps all."))
    """Keep only this many of the most likely tokens; 0 keeps all."""
    top_p: float = field(
        default=0.95, metadata=doc("Keep the most likely tokens that together reach this probability; 1 keeps all.")
    )
    """Keep the fewest most likely tokens whose probabilities add up to this value; 1 keeps all."""
    min_p: float = field(
        default=0.05, metadata=doc("Drop tokens below this share of the highest probability; 0 keeps all.")
    )
    """Drop tokens with less than this share of the highest probability; 0 keeps all."""
    typical_p: float = field(
        default=1.0, metadata=doc("Keep the most typical tokens that together reach this probability; 1 keeps all.")
    )
    """Keep the fewest most typical tokens whose probabilities add up to this value; 1 keeps all.

    See Meister et al., "Locally Typical Sampling" (arXiv:2202.00666).
    """
    top_n_sigma: float = field(
        default=0.0,
        metadata=doc("Keep tokens with a logit at most N standard deviations below the highest; 0 keeps all."),
    )
    """Keep tokens with a logit at most this many standard deviations, of all logits, below the highest; 0 keeps all.

    See Tang et al., "Top-nσ: Not All Logits Are You Need" (arXiv:2411.07641).
    """
    xtc_probability: float = field(
        default=0.0, metadata=doc("Probability with which XTC removes the most likely tokens; 0 turns it off.")
    )
    """The probability of XTC: of the tokens with at least `xtc_threshold`, only the least likely one stays.

    By [p-e-w](https://github.com/oobabooga/text-generation-webui/pull/6335). 0 turns it off.
    """
    xtc_threshold: float = field(
        default=0.1, metadata=doc("Probability from which on XTC removes tokens; over 0.5 it removes none.")
    )
    """The probability from which on XTC removes tokens. Over 0.5 it removes none."""
    dynatemp_range: float = field(
        default=0.0, metadata=doc("How far the temperature follows the entropy, up and down; 0 keeps it fixed.")
    )
    """How far the temperature follows the entropy of the remaining tokens, up and down; 0 keeps it fixed.

    It is lowest where one token is certain, and highest where all are equally likely. Temperature 0 stays greedy.
    """
    dynatemp_exponent: float = field(
        default=1.0, metadata=doc("The power of the entropy, between 0 and 1, in the dynamic temperature.")
    )
    """The power of the entropy, between 0 and 1, in the dynamic temperature."""
    mirostat: int = field(
        default=0, metadata=doc("2 keeps the surprise of tokens near mirostat_tau, instead of filters; 0 turns it off.")
    )
    """2 keeps the surprise of the tokens near `mirostat_tau`, with no other filters; 0 turns it off.

    See Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity" (arXiv:2007.14966).
    Its version 1 is not supported.
    """
    mirostat_tau: float = field(default=5.0, metadata=doc("The surprise that Mirostat aims for, in bits."))
    """The surprise that Mirostat aims for, in bits."""
    mirostat_eta: float = field(default=0.1, metadata=doc("How fast Mirostat corrects its error."))
    """How fast Mirostat corrects its error."""
    dry_multiplier: float = field(
        default=0.0, metadata=doc("Size of the DRY penalties for repetition of sequences; 0 turns them off.")
    )
    """The size of the DRY penalties for tokens that would continue a repetition; 0 turns them off.

    A token that would continue a repetition of `n` tokens loses
    `dry_multiplier * dry_base ** (n - dry_allowed_length)`. By
    [p-e-w](https://github.com/oobabooga/text-generation-webui/pull/5677).
    """
    dry_base: float = field(default=1.75, metadata=doc("How fast DRY penalties grow with the repetition."))
    """How fast DRY penalties grow with the length of the repetition. At least 1."""
    dry_allowed_length: int = field(
        default=2, metadata=doc("Length of a repetition, in tokens, from which on DRY penalizes its next token.")
    )
    """The length of a repetition, in tokens, from which on DRY penalizes its next token."""
    dry_window: int = field(
        default=0, metadata=doc("Number of latest tokens in which DRY finds repetitions; 0 is all.")
    )
    """Number of latest tokens, prompt and completion alike, in which DRY finds repetitions; 0 for all."""
    dry_sequence_breakers: Sequence[str] = field(
        default=DRY_BREAKERS,
        metadata=doc('Text that ends a repetition for DRY, instead of the defaults: newline : " *. Repeatable.'),
    )
    """Strings that end a repetition: DRY does not look beyond the last one."""
    repetition_penalty: float = field(
        default=1.0,
        metadata=doc("Divide positive logits of earlier tokens by this, multiply negative ones; 1 does nothing."),
    )
    """Divide the positive logits of earlier tokens by this and multiply the negative ones; 1 turns it off."""
    presence_penalty: float = field(default=0.0, metadata=doc("Subtract this from the logits of earlier tokens."))
    """Subtract this once from the logit of each earlier token."""
    frequency_penalty: float = field(
        default=0.0, metadata=doc("Subtract this from the logits of earlier tokens, once per occurrence.")
    )
    """Subtract this from the logit of each earlier token, once per occurrence."""
    penalty_window: int = field(
        default=64, metadata=doc("Number of latest tokens, prompt included, that the penalties count; 0 counts all.")
    )
    """Number of latest tokens, prompt and completion alike, that the penalties count; 0 for all."""
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata=doc("Add this to the logit of a token; -inf forbids the token. Repeatable.")
    )
    """Numbers to add to the logits of token ids; `-math.inf` forbids a token."""
    seed: int | None = field(
        default=None,
        metadata=doc("Seed of the random numbers: the same seed gives the same output; a new one if not given."),
    )
    """Seed of the random numbers. The same seed gives the same completion; None draws a new seed for each call."""
    max_tokens: int | None = field(
        default=256, metadata=doc("Stop after this many new tokens, or when the context is full.")
    )
    """Largest number of tokens in a completion; None continues until the context is full."""
    min_tokens: int = field(default=0, metadata=doc("Do not stop before this many new tokens."))
    """Number of tokens before which a completion does not stop.

    Before it, end tokens and `stop_token_ids` are not sampled unless a constraint allows nothing else. Stop strings
    are only looked for in the text after these tokens.
    """
    ignore_eos: bool = field(default=False, metadata=doc("Do not sample the model's end tokens, for benchmarks."))
    """Do not sample the model's end tokens, unless a constraint allows nothing else."""
    stop: str | Sequence[str] | None = field(
        default=(), metadata=doc("Stop before this text, which the output does not include. Repeatable.")
    )
    """Strings that end the completion, which does not include them. They may contain special tokens. None for none."""
    stop_token_ids: Sequence[int] = field(
        default=(), metadata=doc("Stop before any of these tokens; the completion does not include them.")
    )
    """Token ids that end the completion, which does not include them, in addition to the model's end tokens."""
    logprobs: int | None = field(
        default=None, metadata=doc("Report the log-probability of each token and of this many likely alternatives.")
    )
    """Report the log-probability of each token and of this many of the most likely tokens; None reports none."""
    schema: Mapping[str, Any] | type | str | None = field(
        default=None,
        metadata=doc("Constrain the output to JSON that follows this JSON Schema: its text, or @ and a file."),
    )
    """Constrain the output to JSON that follows a JSON Schema: a dict, JSON text or a pydantic model class."""
    regex: str | None = field(default=None, metadata=doc("Constrain the output to this regular expression.", "REGEX"))
    """Constrain the output to a regular expression, which matches all of it."""
    grammar: str | None = field(
        default=None,
        metadata=doc("Constrain the output to this context-free grammar, Lark or GBNF: its text, or @ and a file."),
    )
    """Constrain the output to a context-free grammar, in llguidance's form of Lark's syntax or in llama.cpp's GBNF."""
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = field(
        default=None, metadata=doc("Change the logits before each token, by functions of Python.")
    )
    """A function that changes the logits before each token is sampled, or several, which are called in order.

    It is called with the token ids so far, prompt included, as int64 of shape `(tokens,)`, and with the logits as
    float32 of shape `(vocabulary,)`. It returns logits of that shape, or None after it has changed the array itself.
    Minus infinity forbids a token; NaN and infinity are errors. Its exceptions end the completion. Log-probabilities
    are those before it; a constraint applies after it.
    """
    num_beams: int = field(
        default=1, metadata=doc("Find the most likely output with this many beams, instead of sampling; 1 samples.")
    )
    """Search for the most likely completion with this many beams instead of sampling; 1 samples.

    The completions are those of `transformers`, `GenerationMixin.generate(num_beams=...)`. The text arrives at the end.
    Temperature, filters and seed have no effect. Penalties, DRY, Mirostat, constraints and logits processors are
    refused.
    """
    length_penalty: float = field(
        default=1.0, metadata=doc("Power of the length that a beam's log-probability is divided by.")
    )
    """The power of the length by which the log-probability of a beam is divided: over 0 favors long completions."""
    early_stopping: bool | Literal["never"] = field(
        default=False,
        metadata=doc("End a beam search with its first NUM-BEAMS outputs, or never before a better one is impossible."),
    )
    """When a beam search ends, once it has `num_beams` completions.

    - `True`: at once.
    - `False`: when the best open beam would score lower than all of them, if it ended now.
    - `"never"`: when no open beam can score higher any more.
    """
    adapter: str | None = field(default=None, metadata=doc("Compute with the adapter of this name.", "NAME"))
    """The name of the adapter to compute with, one of `Model.adapters`. None computes with the model alone."""
    reasoning_budget: int | None = field(
        default=None, metadata=doc("End reasoning after this many tokens, and answer; no limit if not given.")
    )
    """Largest number of tokens of reasoning. The model then has to answer. None for no limit.

    With a budget, `schema`, `regex`, `grammar` and `stop` concern the answer alone: a prompt that ends within
    reasoning, as many chat templates write it, first gets its reasoning. Models that do not mark reasoning ignore it.
    """

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _finite(self.temperature) and self.temperature >= 0, "0 or more")
        for name in ("top_k", "penalty_window"):
            value = getattr(self, name)
            _check(name, value, _whole(value) and 0 <= value < 2**32, "a whole number, 0 or more")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _check(name, value, _finite(value) and 0 < value <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, _finite(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        self._check_samplers()
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _finite(penalty) and penalty > 0, "more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), _finite(getattr(self, name)), "a finite number")
        _check("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            fits = _whole(token) and 0 <= token < 2**32 and _number(bias) and (_finite(bias) or bias == -math.inf)
            _check("logit_bias", {token: bias}, fits, "token ids with finite numbers or -inf")
        _check("seed", self.seed, self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**64), "0 to 2**64 - 1")
        for name in ("max_tokens", "logprobs", "reasoning_budget"):
            value = getattr(self, name)
            _check(name, value, value is None or (_whole(value) and 0 <= value < 2**32), "None, or 0 or more")
        _check("min_tokens", self.min_tokens, _whole(self.min_tokens) and 0 <= self.min_tokens < 2**32, "0 or more")
        fits = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, fits, f"at most {self.max_tokens}, the value of max_tokens")
        if self.stop is None:
            object.__setattr__(self, "stop", ())
        _check("stop", self.stop, isinstance(self.stop, (str, Sequence)), "a string or a list of strings")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _check("stop", self.stop, all(map(_text, stop)), "strings that are not empty")
        object.__setattr__(self, "stop", stop)
        _check("stop_token_ids", self.stop_token_ids, _ids(self.stop_token_ids), "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.schema is not None:
            object.__setattr__(self, "schema", schema_text(self.schema))
        _check("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "True or False")
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        _check(" and ".join(given), "each of them", len(given) <= 1, "at most one of schema, regex and grammar")
        for name in given:
            _check(name, getattr(self, name), _text(getattr(self, name)), "a string that is not empty")
        _check("adapter", self.adapter, self.adapter is None or _text(self.adapter), "None or the name of an adapter")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_beams(given)

    def _check_samplers(self) -> None:
        """Checks the options of XTC, dynamic temperature, Mirostat and DRY, and the logits processors."""
        for name in ("xtc_probability", "xtc_threshold"):
            value = getattr(self, name)
            _check(name, value, _finite(value) and 0 <= value <= 1, "from 0 to 1")
        sizes = ("top_n_sigma", "dynatemp_range", "dynatemp_exponent", "mirostat_tau", "mirostat_eta", "dry_multiplier")
        for name in sizes:
            value = getattr(self, name)
            _check(name, value, _finite(value) and value >= 0, "0 or more")
        _check("mirostat", self.mirostat, _whole(self.mirostat) and self.mirostat in (0, 2), "0 or 2")
        _check("dry_base", self.dry_base, _finite(self.dry_base) and self.dry_base >= 1, "1 or more")
        for name in ("dry_allowed_length", "dry_window"):
            value = getattr(self, name)
            _check(name, value, _whole(value) and 0 <= value < 2**32, "a whole number, 0 or more")
        breakers = self.dry_sequence_breakers
        fits = isinstance(breakers, Sequence) and not isinstance(breakers, str) and all(map(_text, breakers))
        fits = fits and all(map(_encodes, breakers))
        _check("dry_sequence_breakers", breakers, fits, "a list of Unicode strings that are not empty")
        object.__setattr__(self, "dry_sequence_breakers", tuple(breakers))
        given = self.logits_processor
        processors = tuple(given) if isinstance(given, Sequence) else () if given is None else (given,)
        _check("logits_processor", given, all(map(callable, processors)), "a function, a list of functions or None")
        object.__setattr__(self, "logits_processor", processors or None)

    def _check_beams(self, constraints: Sequence[str]) -> None:
        """Checks the options of a beam search, and that it obeys all others."""
        beams = self.num_beams
        _check("num_beams", beams, _whole(beams) and 1 <= beams <= MAX_BEAMS, f"a whole number from 1 to {MAX_BEAMS}")
        penalty = self.length_penalty
        _check("length_penalty", penalty, _finite(penalty) and -50 <= penalty <= 50, "from -50 to 50")
        stopping = self.early_stopping
        _check("early_stopping", stopping, isinstance(stopping, bool) or stopping == "never", 'True, False or "never"')
        if beams == 1:
            return
        expected = f"none with num_beams={beams}: a beam search does not use it"
        neutral = {
            "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "mirostat": 0,
            "logits_processor": None,
        }  # fmt: skip
        for name, value in neutral.items():
            _check(name, getattr(self, name), getattr(self, name) == value, expected)
        for name in constraints:
            _check(name, getattr(self, name), False, expected)
        _check("logprobs", self.logprobs, not self.logprobs, f"None or 0 with num_beams={beams}")

    def replace(self, **overrides: Unpack[SamplingOverrides]) -> SamplingOptions:
        """Returns a copy with some options changed."""
        return dataclasses.replace(self, **overrides)


class SamplingOverrides(TypedDict, total=False):
    """Names and types of the fields of `SamplingOptions`, for type checkers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_window: int
    dry_sequence_breakers: Sequence[str]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int
    logit_bias: Mapping[int, float]
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    logprobs: int | None
    schema: Mapping[str, Any] | type | str | None
    regex: str | None
    grammar: str | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    adapter: str | None
    reasoning_budget: int | None


def merge(options: SamplingOptions | None, overrides: SamplingOverrides) -> SamplingOptions:
    """Returns `options`, or the defaults, with single options replaced.

    Raises:
        TypeError: `options` is of another type, or an override is not an option. The message lists the options.
        ValueError: An option is out of range.
    """
    return chosen(SamplingOptions, options, overrides)


@runtime_checkable
class HasSchema(Protocol):
    """An object with a JSON Schema, such as a pydantic model class."""

    def model_json_schema(self) -> dict[str, Any]:
        """Returns the schema."""
        ...


def schema_text(schema: object) -> str:
    """Returns a JSON Schema as JSON text.

    Args:
        schema: A dict, JSON text of an object, or a class with `model_json_schema()`.

    Raises:
        ValueError: `schema` is something else, or cannot be written as JSON.
    """
    if isinstance(schema, HasSchema):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            found = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"schema: found text that is not valid JSON ({error}), expected a JSON Schema") from None
        if isinstance(found, dict):
            return schema
    elif isinstance(schema, Mapping):
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"schema: found a value that JSON cannot represent ({error}), expected a JSON Schema"
            ) from None
    raise ValueError(f"schema: found {schema!r:.80}, expected a dict, JSON text or a pydantic model")


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _encodes(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    # Not math.isfinite: it raises OverflowError for integers beyond every float.
    return _number(value) and -_LARGEST <= value <= _LARGEST


def _ids(values: Any) -> bool:
    is_list = isinstance(values, Sequence | Set) and not isinstance(values, str | bytes)
    return is_list and all(_whole(value) and 0 <= value < 2**32 for value in values)


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def choice_seed(seed: int, index: int) -> int:
    """Returns the seed of one of several completions of a prompt. The first keeps the seed.

    Neighboring seeds give unrelated results. With `seed + index`, the second completion of one request would be the
    first of another.
    """
    state = seed % 2**64
    if index == 0:
        return state
    # SplitMix64 (Steele, Lea and Flood 2014), from a state that differs for each index.
    state = (state + index * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)
