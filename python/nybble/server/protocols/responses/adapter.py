"""Responses on top of the adapter of chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from nybble.chat.tools.reader import new_id
from nybble.sampling import SamplingOptions
from nybble.server import events
from nybble.server.errors import ApiError
from nybble.server.generation import GenerationRequest
from nybble.server.protocols.adapter import TypedEvent, TypedEventAdapter, inner_request, renamed
from nybble.server.protocols.chat import ChatAdapter, described_logprobs
from nybble.server.protocols.chat_schema import ChatRequest
from nybble.server.protocols.reasoning import Reasoned
from nybble.server.protocols.responses.conversation import echoed, messages_of, new_items
from nybble.server.protocols.responses.output import OutputBuilder
from nybble.server.protocols.responses.schema import (
    AllowedFunctions,
    ChosenFunction,
    Conversation,
    Incomplete,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from nybble.server.protocols.responses.store import Stored
from nybble.server.protocols.responses.truncation import Shortened
from nybble.server.protocols.schema import Sampler
from nybble.server.service import Service

Json = dict[str, Any]

_SHARED = (*Sampler.model_fields, *Reasoned.model_fields, "model", "parallel_tool_calls", "chat_template_kwargs")
"""Parameters that chats have under the same name."""
_DEFAULTS = SamplingOptions()


def conversation_of(service: Service, body: Conversation) -> list[Json]:
    """The items before the answer, those of the previous response included.

    Raises:
        ApiError: There are none, or the previous response is not stored.
    """
    before: Sequence[Json] = ()
    if (previous := body.previous_response_id) is not None:
        if (stored := service.responses.get(previous)) is None:
            message = f"the response {previous!r} is not stored on this server, or no longer"
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        before = stored.conversation
    items = [*before, *new_items(body.input, service.responses.items)]
    if not items and body.instructions is None:
        raise ApiError(400, "input is missing", param="input", code="missing_required_parameter")
    return items


def chat_request(body: Conversation, items: Sequence[Json], **more: Any) -> tuple[ChatRequest, dict[str, str]]:
    """The request as a chat, and the names of its parameters by those of chats, for errors.

    Raises:
        ApiError: A parameter is invalid.
    """
    names = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
    names["response_format.json_schema.schema"] = "text.format.schema"
    names |= {f"tools.{n}.function.parameters": f"tools.{n}.parameters" for n in range(len(body.tools or ()))}
    values: Json = {name: getattr(body, name) for name in _SHARED}
    values["messages"] = messages_of(items, body.instructions)
    if body.tools:
        functions = [tool.model_dump(exclude={"type"}, exclude_unset=True) for tool in body.tools]
        values["tools"] = [{"type": "function", "function": function} for function in functions]
    values["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, ChosenFunction):
        values["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    elif isinstance(body.tool_choice, AllowedFunctions):
        chosen = [{"type": "function", "function": {"name": tool.name}} for tool in body.tool_choice.tools]
        values["tool_choice"] = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": body.tool_choice.mode, "tools": chosen},
        }
    form = body.text.format if body.text is not None else None
    if form is not None and form.type != "text":
        schema = {"json_schema": {"name": form.name, "schema": form.definition}} if form.type == "json_schema" else {}
        values["response_format"] = {"type": form.type, **schema}
    return inner_request(ChatRequest, {**values, **more}, names), names


class ResponsesAdapter(TypedEventAdapter):
    """A request for a response."""

    def __init__(self, service: Service, body: ResponsesRequest) -> None:
        super().__init__(body.model, 1, bool(body.stream))
        self._service = service
        self._body = body
        self._items = conversation_of(service, body)
        self._inner, self._names = self._chat(self._items)
        tokenizer = service.engine.model.tokenizer
        self._output = OutputBuilder(
            lambda tokens: [each.model_dump() for each in described_logprobs(tokenizer, tokens)],
            shows_reasoning=body.shows_reasoning,
            seals_reasoning="reasoning.encrypted_content" in (body.include or ()),
        )
        try:
            self._response = self._new_response()
        except (RecursionError, PydanticSerializationError):
            raise ApiError(400, "the request is nested too deeply") from None

    def translate(self) -> GenerationRequest:
        """The request of the inner adapter, with the names of this protocol."""
        request = renamed(self._inner.translate(), self._names)
        if self._body.truncation != "auto":
            return request
        context = self._service.engine.model.info.context
        shortened = Shortened(
            self._items,
            lambda items: self._chat(items)[0].translate(),
            context,
            min(self._body.max_output_tokens or context // 8, context // 2),
        )
        return replace(request, prepare=shortened.prepare, new_parser=lambda: shortened.request.new_parser())

    def _chat(self, items: Sequence[Json]) -> tuple[ChatAdapter, dict[str, str]]:
        """The adapter of a conversation as a chat, and the names of its parameters by those of chats."""
        body = self._body
        logprobs: Json = {"logprobs": True, "top_logprobs": body.top_logprobs or 0} if body.wants_logprobs else {}
        request, names = chat_request(body, items, max_tokens=body.max_output_tokens, **logprobs)
        request.stream = body.stream
        return ChatAdapter(self._service, request), names

    def chunks(self, event: events.Event) -> Iterator[TypedEvent]:
        """The events of the stream."""
        match event:
            case events.AnswerStarted():
                for type in ("response.created", "response.in_progress"):
                    yield self._output.event(type, response=self._response.model_dump(by_alias=True))
            case events.UsageReported(usage):
                self._finish(usage)
                type = f"response.{self._response.status}"
                yield self._output.event(type, response=self._response.model_dump(by_alias=True))
            case _:
                yield from self._output.push(event)

    def result(self) -> ResponseObject:
        """The response."""
        return self._response

    def dump(self, body: BaseModel) -> str:
        """A body or an event as JSON, with all its fields."""
        return body.model_dump_json()

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream with an error."""
        detail = error.body.error
        code = detail.code or detail.type
        first = self._output.event("error", code=code, message=detail.message, param=detail.param)
        failed = self._response.model_copy(
            update={"status": "failed", "error": ResponseError(code=code, message=detail.message)}
        )
        return self.frame(first) + self.frame(self._output.event("response.failed", response=failed.model_dump()))

    def _new_response(self) -> ResponseObject:
        body = self._body
        given = echoed(body.model_dump(by_alias=True))
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        response = ResponseObject(
            id=f"resp_{new_id()}{new_id()}",
            created_at=self._service.now(),
            status="in_progress",
            instructions=given["instructions"],
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=given["metadata"] or {},
            model=self._service.name_of(body.model),
            output=[],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=given["prompt_cache_key"],
            reasoning={"effort": body.reasoning_choice().effort, "summary": None},
            safety_identifier=given["safety_identifier"],
            store=body.store is not False,
            temperature=_DEFAULTS.temperature if body.temperature is None else body.temperature,
            text={"format": echoed(form) or {"type": "text"}},
            tool_choice=given["tool_choice"] or "auto",
            tools=given["tools"] or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=_DEFAULTS.top_p if body.top_p is None else body.top_p,
            truncation=body.truncation or "disabled",
            user=given["user"],
        )
        response.model_dump_json()  # Fails where it is nested too deeply.
        return response

    def _finish(self, usage: events.AnswerUsage) -> None:
        response = self._response
        response.output = self._output.items
        response.usage = ResponseUsage.of(usage)
        response.completed_at = self._service.now()
        response.status = "incomplete" if self._output.is_cut else "completed"
        if self._output.is_cut:
            response.incomplete_details = Incomplete(reason="max_output_tokens")
        if response.store:
            self._service.responses.add(Stored(response.model_dump(), self._items))
