"""`/v1/chat/completions`: a conversation becomes a prompt, and what the model writes becomes messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from nybble.engine import Piece
from nybble.generation import TokenLogprob
from nybble.sampling import SamplingOptions
from nybble.server import responses, tools
from nybble.server.calls import Begun, new_id
from nybble.server.errors import ApiError
from nybble.server.generation import EventStream, Prompt, Run, whole
from nybble.server.requests import ChatRequest, ChosenTool, FunctionDefinition
from nybble.server.responses import ChatLogprob, ChatLogprobs, Delta, TopLogprob
from nybble.server.service import Service
from nybble.tokenizer.tokenizer import Tokenizer


async def chat(service: Service, http: Request, body: ChatRequest) -> Response:
    """Answers one request."""
    count = body.n or 1
    service.admit(body.model, count)
    plan = _Plan.of(service.engine.model.tokenizer, body)
    run = await Run.start(service, http, "messages", lambda: plan.submissions(count))
    answer = _Answer(service, run, plan, f"chatcmpl-{plan.id}")
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(service, run, answer.chunks(with_usage))
    return await whole(service, http, run, answer.completion())


@dataclass(frozen=True)
class _Plan:
    """How a request is going to be answered."""

    tokenizer: Tokenizer
    body: ChatRequest
    format: tools.Format | None
    """How calls are written; None where there are none."""
    forced: bool
    """The answer must be a call."""
    id: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, body: ChatRequest) -> _Plan:
        known = None
        if body.tools and body.tool_choice != "none":
            templates = tokenizer.chat_templates
            known = tools.format_of(templates.get("tool_use", templates.get("default", "")))
            if known is None:
                message = "the chat template of this model defines no calls of functions, or none in a known form"
                raise ApiError(400, message, param="tools", code="unsupported_parameter")
            if body.response_format is not None and body.response_format.type != "text":
                raise ApiError(400, "response_format cannot be had together with tools", param="response_format")
        forced = body.tool_choice == "required" or isinstance(body.tool_choice, ChosenTool)
        for param in ("regex", "grammar"):
            if forced and getattr(body, param) is not None:
                raise ApiError(400, f"{param} cannot be had together with a call that must be made", param=param)
        return cls(tokenizer, body, known, forced, new_id())

    def submissions(self, count: int) -> list[tuple[Prompt, SamplingOptions]]:
        """The prompt and the options of each answer."""
        body = self.body
        given = body.options()
        schema = body.response_format.schema_of_answer() if body.response_format else None
        prompt = self.tokenizer.apply_chat_template(
            [message.for_template() for message in body.messages],
            add_generation_prompt=True,
            tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()] if self.format else None,
            **(body.chat_template_kwargs or {}),
        )
        begin, held = self._beginning()
        prompt += begin
        given.update(held)
        if schema is not None:
            given["schema"] = schema
        ids = self.tokenizer.encode(prompt)
        return [(ids, SamplingOptions(**given, seed=seed)) for seed in body.seeds(count)]

    def parser(self) -> tools.CallParser | tools.PlainText:
        """What reads one answer."""
        if self.format is None:
            return tools.PlainText()
        marks = {self._mark(mark): mark for mark in self.format.marks}
        functions = {function.name: function.parameters for function in self._functions()}
        known = {token: mark for token, mark in marks.items() if token is not None}
        parser = tools.CallParser(self.format, functions, known, stream=bool(self.body.stream))
        parser.push(self._beginning()[0], ())
        return parser

    def _beginning(self) -> tuple[str, dict[str, Any]]:
        """How an answer that must be a call begins, which the prompt ends with, and what the rest is held to."""
        if self.format is None or not self.forced:
            return "", {}
        return self.format.forced(self._functions(), self._mark)

    def _mark(self, text: str) -> int | None:
        """The token of a mark, in vocabularies in which it decodes to nothing."""
        token = self.tokenizer.id_of(text)
        return token if token in self.tokenizer.special_ids else None

    def _functions(self) -> list[FunctionDefinition]:
        return [tool.function for tool in self.body.tools or () if self._may_call(tool.function.name)]

    def _may_call(self, name: str) -> bool:
        choice = self.body.tool_choice
        return not isinstance(choice, ChosenTool) or choice.function.name == name


class _Answer:
    """A run on its way to the client."""

    def __init__(self, service: Service, run: Run, plan: _Plan, id: str) -> None:
        self._run = run
        self._plan = plan
        self._head: dict[str, Any] = {"id": id, "created": service.now(), "model": service.name}
        self._parsers = [plan.parser() for _ in run.requests]

    async def completion(self) -> Response:
        """All answers at once."""
        count = len(self._parsers)
        texts: list[list[str]] = [[] for _ in range(count)]
        calls: list[list[responses.Call]] = [[] for _ in range(count)]
        logprobs: list[list[ChatLogprob]] = [[] for _ in range(count)]
        async for index, piece in self._run.pieces():
            logprobs[index] += _logprobs(self._plan.tokenizer, piece)
            for part in self._parts(index, piece):
                if isinstance(part, str):
                    texts[index].append(part)
                elif isinstance(part, tools.FoundCall):
                    calls[index].append(_call(part))
        choices = []
        for index in range(count):
            message = responses.Answer(role="assistant", content="".join(texts[index]) or None, refusal=None)
            if calls[index]:
                message.tool_calls = calls[index]
            else:
                message.content = message.content or ""
            choices.append(
                responses.ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._with_logprobs(logprobs[index]),
                    finish_reason=self._finish_reason(index),
                )
            )
        done = responses.ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=self._run.usage()
        )
        return Response(done.model_dump_json(exclude_unset=True), media_type="application/json")

    async def chunks(self, with_usage: bool) -> AsyncIterator[str]:
        """All answers piece by piece."""
        count = len(self._parsers)
        waiting: list[list[ChatLogprob]] = [[] for _ in range(count)]
        called = [0] * count
        for index in range(count):
            yield self._chunk(index, Delta(role="assistant", content=""))
        async for index, piece in self._run.pieces():
            waiting[index] += _logprobs(self._plan.tokenizer, piece)
            for part in self._parts(index, piece):
                called[index] += isinstance(part, Begun)
                yield self._chunk(index, _delta(part, called[index] - 1), waiting[index])
                waiting[index] = []
            if piece is None:
                yield self._chunk(index, Delta(), waiting[index], self._finish_reason(index))
        if with_usage:
            last = responses.ChatChunk(
                **self._head, object="chat.completion.chunk", choices=[], usage=self._run.usage()
            )
            yield last.model_dump_json(exclude_unset=True)

    def _parts(self, index: int, piece: Piece | None) -> Sequence[tools.Part]:
        parser = self._parsers[index]
        before = parser.calls
        parts = parser.finish() if piece is None else parser.push(piece.text, piece.tokens)
        if self._plan.body.parallel_tool_calls is False and parser.calls:
            return _up_to_first_call(parts, before)
        return parts

    def _finish_reason(self, index: int) -> responses.FinishReason:
        reason = self._run.finish_reason(index)
        return "tool_calls" if reason == "stop" and self._parsers[index].calls else reason

    def _with_logprobs(self, content: list[ChatLogprob]) -> ChatLogprobs | None:
        return ChatLogprobs(content=content, refusal=None) if self._plan.body.logprobs else None

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: Sequence[ChatLogprob] = (),
        finish_reason: responses.FinishReason | None = None,
    ) -> str:
        choice = responses.ChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._with_logprobs(list(logprobs)) if logprobs else None,
            finish_reason=finish_reason,
        )
        chunk = responses.ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice])
        return chunk.model_dump_json(exclude_unset=True)


def _call(found: tools.FoundCall) -> responses.Call:
    function = responses.CalledFunction(name=found.name, arguments=found.arguments)
    return responses.Call(id=found.id, type="function", function=function)


def _delta(part: tools.Part, index: int) -> Delta:
    """A part of an answer in a stream; `index` is the number of the call that it may belong to."""
    if isinstance(part, str):
        return Delta(content=part)
    if isinstance(part, Begun):
        function = responses.FunctionDelta(name=part.name, arguments="")
        return Delta(tool_calls=[responses.CallDelta(index=index, id=part.id, type="function", function=function)])
    piece = part.text if isinstance(part, tools.Arguments) else part.arguments
    return Delta(tool_calls=[responses.CallDelta(index=index, function=responses.FunctionDelta(arguments=piece))])


def _up_to_first_call(parts: Sequence[tools.Part], calls: int) -> list[tools.Part]:
    """The parts without what comes after the first call, of which or of others `calls` began in earlier parts."""
    kept: list[tools.Part] = []
    for part in parts:
        calls += isinstance(part, Begun | tools.FoundCall)
        if calls > 1 or (calls == 1 and isinstance(part, str)):
            break
        kept.append(part)
    return kept


def _logprobs(tokenizer: Tokenizer, piece: Piece | None) -> list[ChatLogprob]:
    def described(token: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": finite(logprob), "bytes": list(bytes_of(tokenizer, token))}

    def all_about(found: TokenLogprob) -> ChatLogprob:
        top = [TopLogprob(**described(*other)) for other in found.top]
        return ChatLogprob(**described(found.token, found.text, found.logprob), top_logprobs=top)

    return [] if piece is None else [all_about(found) for found in piece.logprobs or ()]


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; none for an id that only pads the model's matrices."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for tokens that cannot be."""
    return max(logprob, -9999.0)
