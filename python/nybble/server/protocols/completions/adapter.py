"""`/v1/completions`: prompts as text or tokens in, text out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.chat.tools.reader import new_id
from nybble.generation import TokenLogprob
from nybble.generation.request import check_length, prompt_ids
from nybble.sampling import SamplingOptions
from nybble.server import events
from nybble.server.errors import ApiError
from nybble.server.generation import GenerationRequest, Prompt
from nybble.server.protocols.adapter import CollectingAdapter
from nybble.server.protocols.completions.scoring import score
from nybble.server.protocols.schema import Sampling, TokenId, Usage, finite
from nybble.server.service import Service

Prompts = str | list[TokenId] | list[str] | list[list[TokenId]]


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompts = Field(description="A string, token ids, or a list of either.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = Field(
        default=None, description="Put the prompt before the completion, with its log-probabilities if logprobs is set."
    )
    suffix: str | None = Field(
        default=None, description="The text after the completion, for models with tokens for filling in the middle."
    )
    reasoning: Any = Field(default=None, description="Ignored, as the other parameters of reasoning: text has none.")
    include_reasoning: bool | None = Field(default=None, description="Ignored.")
    reasoning_format: str | None = Field(default=None, description="Ignored.")
    max_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        default=None, description="-1 stands for no limit. 0 generates nothing, which is useful with echo."
    )

    @model_validator(mode="after")
    def _check_suffix(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise PydanticCustomError("invalid", "suffix cannot be combined with echo")
        if self.suffix and not all(isinstance(prompt, str) for prompt in prompts_of(self.prompt)):
            raise PydanticCustomError("invalid", "suffix requires prompts that are text, found token ids")
        return self

    def options(self) -> dict[str, Any]:
        """The options that were given. Without a limit, a completion has 16 tokens, as with OpenAI."""
        limit = self.n_predict if self.max_tokens is None else self.max_tokens
        given = {**super().options(), "max_tokens": 16 if limit is None else self.limit}
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
        return given


class TextLogprobs(BaseModel):
    """The log-probabilities of the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """Tokens that share their text with another are called `token_id:ID`."""
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the completions, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: events.FinishReason | None


class TextCompletion(BaseModel):
    """The completions of prompts, or a piece of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class CompletionAdapter(CollectingAdapter):
    """A request for completions."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._prompts = prompts_of(body.prompt)
        if not self._prompts:
            raise ApiError(400, "prompt: found an empty list, expected at least one prompt", param="prompt")
        self._per_prompt = body.n or 1
        super().__init__(body.model, len(self._prompts) * self._per_prompt, bool(body.stream))
        self._model = service.engine.model
        self._tokenizer = self._model.tokenizer
        self._lora = service.lora_of(body.model)
        self._body = body
        self._head: dict[str, Any] = {
            "id": f"cmpl-{new_id()}",
            "object": "text_completion",
            "created": service.now(),
            "model": service.name_of(body.model),
        }
        self._offsets = [0] * self.answers
        """Characters of each answer so far."""
        self._pending: list[TextLogprobs | None] = [None] * self.answers
        """Log-probabilities for the next chunk of each answer."""
        self._echoes: list[tuple[str, TextLogprobs | None]] = []
        """The text of each prompt and the log-probabilities of its tokens, if the client asks for an echo."""

    def translate(self) -> GenerationRequest:
        """The prompts, each repeated once per answer."""

        def prepare() -> list[tuple[Prompt, SamplingOptions]]:
            given = self._body.options()
            for prompt in self._prompts:
                if isinstance(prompt, str):
                    check_length(self._model, prompt)
            all_ids = [self._ids(prompt) for prompt in self._prompts]
            if self._body.suffix:
                ends = given.get("stop_token_ids", ())
                given["stop_token_ids"] = [*ends, *self._tokenizer.infill_ids]
            seeds = self._body.seeds(self._per_prompt)
            return [(ids, SamplingOptions(**given, seed=seed)) for ids in all_ids for seed in seeds]

        return GenerationRequest(
            param="prompt",
            prepare=prepare,
            parameters=self._body.form_parameters(),
            prompts=len(self._prompts),
            before=[functools.partial(self._add_echo, prompt) for prompt in self._prompts] if self._body.echo else (),
        )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if suffix := self._body.suffix:
            check_length(self._model, suffix)
            return self._tokenizer.encode_infill(prompt, suffix)
        return self._tokenizer.encode_prompt(prompt)

    def _add_echo(self, prompt: str | list[int]) -> None:
        """Computes the echo of the next prompt."""
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        if self._body.logprobs is None:
            self._echoes.append((text, None))
            return
        if isinstance(prompt, str):
            check_length(self._model, prompt)
        ids = prompt_ids(self._tokenizer, prompt)
        (first, *_) = ids
        tokens = score(self._model, ids, self._body.logprobs, self._lora)
        found = _described(tokens, len(self._tokenizer.decode([first])))
        self._echoes.append(
            (
                text,
                TextLogprobs(
                    tokens=[self._tokenizer.decode([first]), *found.tokens],
                    token_logprobs=[None, *found.token_logprobs],
                    top_logprobs=[None, *found.top_logprobs],
                    text_offset=[0, *found.text_offset],
                ),
            )
        )

    def _echo(self, answer: int) -> tuple[str, TextLogprobs | None]:
        return self._echoes[answer // self._per_prompt] if self._body.echo else ("", None)

    def response(self, answers: Sequence[events.CollectedAnswer], usage: events.AnswerUsage) -> TextCompletion:
        """The completion that holds all answers."""
        choices = []
        for index, answer in enumerate(answers):
            text, logprobs = self._echo(index)
            if self._body.logprobs is not None:
                logprobs = _joined(logprobs, _described(answer.logprobs, len(text)))
            choices.append(
                TextChoice(index=index, text=text + answer.text, logprobs=logprobs, finish_reason=answer.reason)
            )
        return TextCompletion(**self._head, choices=choices, usage=Usage.of(usage))

    def chunks(self, event: events.Event) -> Iterator[TextCompletion]:
        """The chunks of an event."""
        match event:
            case events.AnswerStarted(answer):
                text, self._pending[answer] = self._echo(answer)
                self._offsets[answer] = len(text)
                if text or self._pending[answer] is not None:
                    yield self._chunk(answer, text)
            case events.LogprobsDelta(answer, tokens):
                self._pending[answer] = _joined(self._pending[answer], _described(tokens, self._offsets[answer]))
                self._offsets[answer] += sum(len(token.text) for token in tokens)
            case events.TextDelta(answer, text):
                yield self._chunk(answer, text)
            case events.AnswerFinished(answer, reason):
                yield self._chunk(answer, "", reason)
            case events.UsageReported(usage):
                if self._body.wants_usage:
                    yield TextCompletion(**self._head, choices=[], usage=Usage.of(usage))

    def _chunk(self, answer: int, text: str, reason: events.FinishReason | None = None) -> TextCompletion:
        logprobs, self._pending[answer] = self._pending[answer], None
        choice = TextChoice(index=answer, text=text, logprobs=logprobs, finish_reason=reason)
        return TextCompletion(**self._head, choices=[choice])


def prompts_of(prompt: Prompts) -> list[str | list[int]]:
    """The prompts of a field that holds one or several."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [item for item in prompt if not isinstance(item, int)]


def _described(tokens: Sequence[TokenLogprob], offset: int) -> TextLogprobs:
    """`offset` is the number of characters before the first token."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[finite(token.logprob) for token in tokens],
        top_logprobs=[_named(token) for token in tokens],
        text_offset=offsets,
    )


def _named(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens at a position by text. Of several with the same text, one keeps it: the token itself."""
    names: dict[str, int] = {token.text: token.token}
    found = {}
    for other, text, value in token.top:
        found[text if names.setdefault(text, other) == other else f"token_id:{other}"] = finite(value)
    return found


def _joined(first: TextLogprobs | None, then: TextLogprobs) -> TextLogprobs:
    if first is None:
        return then
    return TextLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=first.top_logprobs + then.top_logprobs,
        text_offset=first.text_offset + then.text_offset,
    )
