"""The parts of OpenAI's wire protocols that chat and completions share. Unknown parameters are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from nybble import generation
from nybble.sampling import choice_seed

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Grammar = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]

MAX_CHOICES = 16


class Strict(BaseModel):
    """A part of a request. Values are not converted, and unknown parameters are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream contains in addition to the answers."""

    include_usage: bool = False


class Sampling(Strict):
    """The parameters of both chat and completions. Defaults are those of `nybble.SamplingOptions`."""

    model: str | None = Field(default=None, description="The name of the model; the served model if omitted.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="The number of answers. The first answer uses the seed, and the others derive theirs from it.",
    )
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        default=None, max_length=1024, description="Token ids, as strings, with the bias to add to their logits."
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    user: str | None = Field(default=None, description="Accepted for compatibility and ignored.")
    top_k: TokenId | None = Field(
        default=None, description="Extension of nybble: keep the K likeliest tokens; 0 keeps all."
    )
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Extension of nybble: drop tokens less likely than this share of the likeliest token.",
    )
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Extension of nybble: keep the most typical tokens that reach this probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None, description="Extension of nybble: divide the logits of tokens seen before."
    )
    penalty_window: TokenId | None = Field(
        default=None, description="Extension of nybble: the number of last tokens that penalties consider; 0 for all."
    )
    regex: Grammar | None = Field(
        default=None, description="Extension of nybble: a regular expression that the whole answer matches."
    )
    grammar: Grammar | None = Field(
        default=None, description="Extension of nybble: a Lark grammar that the whole answer follows."
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options requires stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """The options that were given, named as in `nybble.SamplingOptions`."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "penalty_window", "stop", "max_tokens", "regex", "grammar",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return given

    def seeds(self, count: int) -> list[int | None]:
        """A seed for each of `count` answers."""
        return [None if self.seed is None else choice_seed(self.seed, i) for i in range(count)]


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ValueError(f"logit_bias: found {key[:20]!r}, expected a token id")
    return int(key)


class PromptDetails(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class Usage(BaseModel):
    """The tokens of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, usage: generation.Usage) -> Usage:
        """The usage as clients receive it."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=usage.cached_tokens),
        )


def finite(logprob: float) -> float:
    """A log-probability for JSON, which has no infinity. OpenAI writes -9999 for impossible tokens."""
    return max(logprob, -9999.0)
