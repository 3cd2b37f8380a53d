"""Ollama's chats and completions on top of the adapters of OpenAI's protocols."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from nybble.generation import TokenLogprob
from nybble.server import events
from nybble.server.errors import ApiError
from nybble.server.generation import GenerationRequest
from nybble.server.protocols.adapter import Adapter, CollectingAdapter, call_values, inner_request, renamed
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.chat_schema import ChatRequest
from nybble.server.protocols.completions.adapter import CompletionAdapter, CompletionRequest
from nybble.server.protocols.ollama.schema import (
    AnsweredCall,
    AnsweredFunction,
    AnsweredMessage,
    OllamaAnswer,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaLogprob,
)
from nybble.server.protocols.schema import finite
from nybble.server.service import Service

_OWN_NAMES = {"json_schema": "format", "response_format": "format"}
"""Ollama's names of parameters of the other protocols."""


class OllamaAdapter(CollectingAdapter):
    """A request for a chat or a completion.

    Args:
        service: The service.
        body: The request.
        inner: The adapter that translates the request.
        is_chat: Whether answers are messages.
    """

    end_of_stream = b""
    media_type = "application/x-ndjson"

    def __init__(
        self, service: Service, body: OllamaChatRequest | OllamaGenerateRequest, inner: Adapter, *, is_chat: bool
    ) -> None:
        super().__init__(body.model, 1, body.stream is not False)
        self._service = service
        self._inner = inner
        self._is_chat = is_chat
        self._wants_logprobs = bool(body.logprobs)
        self._started_at = time.perf_counter_ns()
        self._first_at: int | None = None
        self._reason: events.FinishReason = "stop"
        self._calls: list[events.CollectedCall] = []
        self._pending: list[TokenLogprob] = []
        """Log-probabilities for the next chunk."""

    def translate(self) -> GenerationRequest:
        """The request of the inner adapter, with Ollama's names of parameters."""
        return renamed(self._inner.translate(), _OWN_NAMES)

    def response(self, answers: Sequence[events.CollectedAnswer], usage: events.AnswerUsage) -> OllamaAnswer:
        """The whole answer."""
        (answer,) = answers
        self._pending = answer.logprobs
        return self._finished(answer.text, answer.calls, answer.reason, usage, answer.reasoning)

    def chunks(self, event: events.Event) -> Iterator[OllamaAnswer]:
        """The lines of an event. A tool call is one line."""
        if self._first_at is None and isinstance(
            event, events.LogprobsDelta | events.TextDelta | events.ReasoningDelta | events.ToolCallStarted
        ):
            self._first_at = time.perf_counter_ns()
        match event:
            case events.LogprobsDelta(_, tokens):
                self._pending += tokens
            case events.TextDelta(_, text) if text:
                yield self._answer(text, ())
            case events.ReasoningDelta(_, text) if text:
                yield self._answer("", (), text)
            case events.ToolCallStarted(_, _, id, name):
                self._calls.append(events.CollectedCall(id, name))
            case events.ToolCallDelta(_, _, arguments):
                self._calls[-1].arguments += arguments
                yield self._answer("", [self._calls[-1]])
            case events.AnswerFinished(_, reason):
                self._reason = reason
            case events.UsageReported(usage):
                yield self._finished("", (), self._reason, usage)

    def frame(self, chunk: BaseModel) -> bytes:
        """A message as a line."""
        return f"{self.dump(chunk)}\n".encode()

    def failure(self, error: ApiError) -> bytes:
        """The error that ends a stream, as the Ollama client expects it."""
        return json.dumps({"error": error.body.error.message}).encode() + b"\n"

    def dump(self, body: BaseModel) -> str:
        """A line, without the fields that are not set."""
        return body.model_dump_json(exclude_none=True)

    def _answer(
        self, text: str, calls: Sequence[events.CollectedCall], reasoning: str = "", **more: Any
    ) -> OllamaAnswer:
        pending, self._pending = self._pending, []
        answer = OllamaAnswer(model=self._service.name_of(self.model), created_at=now(), **{"done": False, **more})
        if self._is_chat:
            answer.message = AnsweredMessage(content=text, thinking=reasoning or None)
            if calls:
                answer.message.tool_calls = [
                    AnsweredCall(
                        id=call.id, function=AnsweredFunction(name=call.name, arguments=call_values(call.arguments))
                    )
                    for call in calls
                ]
        else:
            answer.response, answer.thinking = text, reasoning or None
        if self._wants_logprobs and pending:
            answer.logprobs = [self._described(token) for token in pending]
        return answer

    def _finished(
        self,
        text: str,
        calls: Sequence[events.CollectedCall],
        reason: events.FinishReason,
        usage: events.AnswerUsage,
        reasoning: str = "",
    ) -> OllamaAnswer:
        end = time.perf_counter_ns()
        first = end if self._first_at is None else self._first_at
        return self._answer(
            text,
            calls,
            reasoning,
            done=True,
            done_reason="length" if reason == "length" else "stop",
            total_duration=end - self._started_at,
            load_duration=0,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=first - self._started_at,
            eval_count=usage.completion_tokens,
            eval_duration=end - first,
        )

    def _described(self, token: TokenLogprob) -> OllamaLogprob:
        def described(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

        return OllamaLogprob(
            **described(token.text, token.logprob),
            top_logprobs=[described(text, logprob) for _, text, logprob in token.top] or None,
        )


def chat_adapter(service: Service, body: OllamaChatRequest) -> OllamaAdapter:
    """The adapter of a chat.

    Raises:
        ApiError: The request is invalid.
    """
    request = inner_request(
        ChatRequest,
        {
            **body.parameters(),
            **body.chat_parameters(),
            "messages": [message.message() for message in body.messages or ()],
            "tools": None if body.tools is None else [tool.model_dump(exclude_unset=True) for tool in body.tools],
        },
    )
    return OllamaAdapter(service, body, ChatAdapter(service, request), is_chat=True)


def generate_adapter(service: Service, body: OllamaGenerateRequest) -> OllamaAdapter:
    """The adapter of a completion, whose prompt is a message unless the request or the model wants it as it is.

    Raises:
        ApiError: The request is invalid.
    """
    prompt = body.prompt or ""
    inner: Adapter
    if body.raw or body.suffix or not service.engine.model.tokenizer.has_chat_template:
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        text = f"{body.system}\n\n{prompt}" if body.system else prompt
        own = {"prompt": text, "suffix": body.suffix, "logprobs": logprobs}
        inner = CompletionAdapter(service, inner_request(CompletionRequest, {**body.parameters(), **own}))
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        inner = ChatAdapter(
            service, inner_request(ChatRequest, {**body.parameters(), **body.chat_parameters(), "messages": messages})
        )
    return OllamaAdapter(service, body, inner, is_chat=False)


def loaded(name: str, body: OllamaChatRequest | OllamaGenerateRequest) -> OllamaAnswer:
    """The answer to a request without a prompt, which asks to load or to unload the model of this name."""
    reason: Literal["load", "unload"] = "unload" if body.keep_alive in (0, "0", "0s") else "load"
    answer = OllamaAnswer(model=name, created_at=now(), done=True, done_reason=reason)
    if isinstance(body, OllamaChatRequest):
        answer.message = AnsweredMessage(content="")
    else:
        answer.response = ""
    return answer


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
