"""The parts of OpenAI's wire protocols that chat and completions share. Unknown parameters are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from nybble.sampling import choice_seed
from nybble.server.events import AnswerUsage
from nybble.server.protocols.forms import Formed
from nybble.server.protocols.strict import Off, On, Strict

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Breaker = Annotated[str, StringConstraints(min_length=1, max_length=40)]
Limit = Literal[-1] | Count
"""A number of tokens; -1 stands for no limit, as with llama-server."""

Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]

MAX_CHOICES = 16
MAX_SERVED_BEAMS = 16
"""The largest number of beams of a request. Each one computes as much as a request."""


class StreamOptions(Strict):
    """What a stream contains in addition to the answers."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Ignored.")


class Neutral(Strict):
    """Parameters that do not change answers: accepted so that clients need no special case, and ignored.

    Where a value would change answers, only those that do not are accepted.
    """

    user: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = Field(default=None, description="Speculation finds repetitions by itself.")
    cache_prompt: bool | None = Field(default=None, description="Prompts are always cached.")
    guided_decoding_backend: str | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = Field(default=None, description="Prompts are cached by their tokens.")
    id_slot: int | None = None
    n_keep: int | None = Field(default=None, description="A prompt that does not fit is an error.")
    best_of: Literal[1] | None = None
    use_beam_search: Off | None = None
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: Off | None = None
    detokenize: On | None = None
    return_token_ids: Off | None = None
    return_tokens: Off | None = None
    return_tokens_as_token_ids: Off | None = None
    timings_per_token: Off | None = None
    post_sampling_probs: Off | None = None
    bad_words: Nothing | None = None
    lora: Nothing | None = None
    documents: Nothing | None = None
    n_probs: Zero | None = None
    top_a: Zero | None = None
    tfs_z: Annotated[float, Field(ge=1, le=1)] | None = None
    t_max_predict_ms: Annotated[int, Field(le=0)] | None = None


class Sampler(Strict):
    """How tokens are sampled, and what ends an answer. Defaults are those of `nybble.SamplingOptions`."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        default=None, max_length=1024, description="Token ids, as strings, with the bias to add to their logits."
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        default=None, description="Extension of nybble: tokens that end the answer, which does not include them."
    )
    min_tokens: TokenId | None = Field(
        default=None, description="Extension of nybble: the answer does not stop before this many tokens."
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="Extension of nybble: keep the K likeliest tokens; 0 and -1 keep all."
    )
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Extension of nybble: drop tokens less likely than this share of the likeliest token.",
    )
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Extension of nybble: keep the most typical tokens that reach this probability."
    )
    repetition_penalty: Repetition | None = Field(
        default=None, description="Extension of nybble: divide the logits of tokens seen before."
    )
    penalty_window: TokenId | None = Field(
        default=None, description="Extension of nybble: the number of last tokens that penalties consider; 0 for all."
    )
    ignore_eos: bool | None = Field(
        default=None, description="As with llama-server: the model's end tokens are not sampled."
    )
    top_n_sigma: Annotated[float, Field(ge=-1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="As with llama-server: keep tokens up to this many standard deviations below the likeliest one; "
        "0 and -1 keep all.",
    )
    xtc_probability: Share | None = Field(
        default=None, description="As with llama-server: the probability with which XTC removes the likeliest tokens."
    )
    xtc_threshold: Share | None = Field(
        default=None, description="As with llama-server: the probability from which on XTC removes tokens."
    )
    dynatemp_range: Size | None = Field(
        default=None, description="As with llama-server: how far the temperature follows the entropy."
    )
    dynatemp_exponent: Size | None = None
    mirostat: Literal[0, 2] | None = Field(
        default=None,
        description="2 for Mirostat 2, 0 for none, as with llama-server. Penalties and DRY apply before it.",
    )
    mirostat_tau: Size | None = None
    mirostat_eta: Size | None = None
    dry_multiplier: Size | None = Field(
        default=None, description="As with llama-server: the size of the penalties for repeated sequences; 0 for none."
    )
    dry_base: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = None
    dry_allowed_length: TokenId | None = None
    dry_window: TokenId | None = Field(
        default=None, description="Extension of nybble: the number of last tokens that DRY considers; 0 for all."
    )
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None,
        description="As dry_window with llama-server: -1, the default here, stands for all tokens, 0 for no penalties.",
    )
    dry_sequence_breakers: Annotated[list[Breaker], Field(max_length=32)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_SERVED_BEAMS)] | None = Field(
        default=None, description="Extension of nybble: find the most likely answer with this many beams."
    )
    length_penalty: Annotated[float, Field(ge=-50, le=50, allow_inf_nan=False)] | None = None
    early_stopping: bool | Literal["never"] | None = Field(
        default=None, description="Extension of nybble: when a beam search ends, as in transformers."
    )

    def options(self) -> dict[str, Any]:
        """The options that were given, named as in `nybble.SamplingOptions`."""
        given = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        given |= {name: 0 for name in ("top_k", "top_n_sigma") if given.get(name, 0) < 0}
        if self.dry_penalty_last_n == 0:
            given["dry_multiplier"] = 0.0
        elif self.dry_penalty_last_n is not None:
            given["dry_window"] = max(self.dry_penalty_last_n, 0)
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return given


_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "penalty_window", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "top_n_sigma",
    "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_tau",
    "mirostat_eta", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_window", "dry_sequence_breakers",
    "num_beams", "length_penalty", "early_stopping",
)  # fmt: skip
"""Parameters that are options of the same name."""


class Sampling(Neutral, Formed, Sampler):
    """The parameters of both chat and completions."""

    model: str | None = Field(default=None, description="The name of the model; the served model if omitted.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="The number of answers. The first answer uses the seed, and the others derive theirs from it.",
    )
    max_tokens: Limit | None = None
    n_predict: Limit | None = Field(default=None, description="Another name of max_tokens, as with llama-server.")
    repeat_penalty: Repetition | None = Field(
        default=None, description="Another name of repetition_penalty, as with llama-server."
    )
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None,
        description="As penalty_window with llama-server: -1 stands for all tokens, and 0 for no penalties.",
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options requires stream=true")
        if (self.n or 1) > 1 and (self.num_beams or 1) > 1:
            raise PydanticCustomError("invalid", "n: expected 1 with num_beams, which gives one answer")
        for name, other in _OTHER_NAMES.items():
            if None not in (a := getattr(self, name), b := getattr(self, other)) and a != b:
                raise PydanticCustomError(
                    "invalid", "{other} is another name of {name}: give one of them", {"name": name, "other": other}
                )
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """The largest number of tokens that was given; None without a limit."""
        given = self.n_predict if self.max_tokens is None else self.max_tokens
        return None if given == -1 else given

    def options(self) -> dict[str, Any]:
        """The options that were given, named as in `nybble.SamplingOptions`."""
        given = super().options()
        if self.repeat_penalty is not None:
            given["repetition_penalty"] = self.repeat_penalty
        if self.repeat_last_n == 0:
            given |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        elif self.repeat_last_n is not None:
            given["penalty_window"] = max(self.repeat_last_n, 0)
        given |= self.form_options()
        return given

    def seeds(self, count: int) -> list[int | None]:
        """A seed for each of `count` answers."""
        return [None if self.seed is None else choice_seed(self.seed, i) for i in range(count)]


_OTHER_NAMES = {
    "repetition_penalty": "repeat_penalty",
    "max_tokens": "n_predict",
    "penalty_window": "repeat_last_n",
    "dry_window": "dry_penalty_last_n",
}
"""Parameters with a second name."""


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ValueError(f"logit_bias: found {key[:20]!r}, expected a token id")
    return int(key)


class PromptDetails(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """What the tokens of the answers are."""

    reasoning_tokens: int


class Usage(BaseModel):
    """The tokens of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, usage: AnswerUsage) -> Usage:
        """The usage as clients receive it."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionDetails(reasoning_tokens=usage.reasoning_tokens),
        )


def finite(logprob: float) -> float:
    """A log-probability for JSON, which has no infinity. OpenAI writes -9999 for impossible tokens."""
    return max(logprob, -9999.0)
