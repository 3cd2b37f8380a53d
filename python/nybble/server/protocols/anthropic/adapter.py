"""Messages on top of the adapter of chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from nybble.chat.tools.reader import new_id
from nybble.server import events
from nybble.server.errors import ApiError
from nybble.server.generation import GenerationRequest
from nybble.server.protocols.adapter import TypedEvent, TypedEventAdapter, call_values, inner_request, renamed
from nybble.server.protocols.anthropic.blocks import (
    Json,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of,
)
from nybble.server.protocols.anthropic.schema import (
    AnsweredBlock,
    AnsweredCall,
    AnsweredMessage,
    AnsweredText,
    AnsweredThinking,
    Conversation,
    Message,
    MessagesRequest,
    MessageUsage,
    StopReason,
)
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.chat_schema import ChatRequest
from nybble.server.service import Service

_SIGNATURE = "nybble"
"""Clients drop thinking without a signature. The server does not check it."""


def chat_request(body: Conversation, **more: Any) -> tuple[ChatRequest, dict[str, str]]:
    """The request as a chat, and the names of its parameters by those of chats, for errors.

    Raises:
        ApiError: A parameter is invalid.
    """
    names = {"stop": "stop_sequences", "response_format": "output_config.format"}
    names["response_format.json_schema.schema"] = "output_config.format.schema"
    names |= {f"tools.{n}.function.parameters": f"tools.{n}.input_schema" for n in range(len(body.tools or ()))}
    messages = _messages(body)
    chosen, config, thinking = body.tool_choice, body.output_config, body.thinking
    values: Json = {
        "model": body.model,
        "messages": messages,
        "continue_final_message": True if messages[-1]["role"] == "assistant" else None,
        "tools": [_function(tool.name, tool.description, tool.input_schema) for tool in body.tools or ()] or None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "reasoning_effort": None if config is None else config.effort,
    }
    if chosen is not None:
        by_type: Json = {"any": "required", "tool": {"type": "function", "function": {"name": chosen.name}}}
        values["tool_choice"] = by_type.get(chosen.type, chosen.type)
        values["parallel_tool_calls"] = not chosen.disable_parallel_tool_use
    if thinking is not None:
        values["enable_thinking"] = thinking.type != "disabled"
        values["reasoning_budget"] = thinking.budget_tokens
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.definition}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    return inner_request(ChatRequest, {**values, **more}, names), names


def _function(name: str, description: str | None, schema: Json) -> Json:
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _messages(body: Conversation) -> list[Json]:
    """The conversation as chats have it: results of tools are messages of their own."""
    turns: list[Json] = [] if body.system is None else [{"role": "system", "content": text_of(body.system)}]
    for message in body.messages:
        for turn in _turns(message):
            last = turns[-1] if turns else {}
            if turn["role"] == last.get("role") and turn["role"] != "tool":
                _join(last, turn)
            else:
                turns.append(turn)
    return turns


def _turns(message: Message) -> Iterator[Json]:
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    turn: Json = {"role": message.role, "content": None}
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            if turn["content"] is not None:
                yield turn
                turn = {"role": message.role, "content": None}
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
        elif isinstance(block, TextBlock):
            _join(turn, {"content": block.text})
        elif isinstance(block, ThinkingBlock):
            _join(turn, {"reasoning_content": block.thinking})
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            _join(turn, {"tool_calls": [{"id": block.id, "type": "function", "function": function}]})
    if len(turn) > 2 or turn["content"] is not None:
        yield turn
    elif not any(isinstance(block, ToolResultBlock) for block in message.content):
        yield {**turn, "content": ""}


def _join(turn: Json, more: Json) -> None:
    """Appends the parts of a turn to those of another of the same role."""
    for name, value in more.items():
        before = turn.get(name)
        if name == "role" or value is None:
            continue
        if before is None:
            turn[name] = value
        else:
            turn[name] = before + value if name == "tool_calls" else f"{before}\n{value}"


class MessagesAdapter(TypedEventAdapter):
    """A request for a message."""

    def __init__(self, service: Service, body: MessagesRequest) -> None:
        super().__init__(body.model, 1, bool(body.stream))
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream", "max_tokens")
        given = {name: getattr(body, name) for name in names}
        request, self._names = chat_request(body, stop=body.stop_sequences or None, **given)
        self._inner = ChatAdapter(service, request)
        thinking = body.thinking
        # Programs that do not ask for thinking take the first block for the text.
        self._shows_thinking = thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"
        self._message = AnsweredMessage(
            id=f"msg_{new_id()}{new_id()}",
            model=service.name_of(body.model),
            content=[],
            usage=MessageUsage(input_tokens=0, output_tokens=0),
        )
        self._open: AnsweredBlock | None = None
        self._input = ""
        """The input of the call that is open, as JSON."""

    def translate(self) -> GenerationRequest:
        """The request of the inner adapter, with the names of this protocol."""
        return renamed(self._inner.translate(), self._names)

    def chunks(self, event: events.Event) -> Iterator[TypedEvent]:
        """The events of the stream."""
        match event:
            case events.AnswerStarted(_, prompt_tokens):
                self._message.usage.input_tokens = prompt_tokens
                yield TypedEvent.of("message_start", message=self._message.model_dump())
            case events.ReasoningDelta(_, text) if text and self._shows_thinking:
                block = self._open
                if not isinstance(block, AnsweredThinking):
                    yield from self._begin(block := AnsweredThinking(thinking="", signature=""))
                block.thinking += text
                yield self._delta(type="thinking_delta", thinking=text)
            case events.TextDelta(_, text) if text:
                said = self._open
                if not isinstance(said, AnsweredText):
                    yield from self._begin(said := AnsweredText(text=""))
                said.text += text
                yield self._delta(type="text_delta", text=text)
            case events.ToolCallStarted(_, _, id, name):
                yield from self._begin(AnsweredCall(id=id, name=name, input={}))
            case events.ToolCallDelta(_, _, arguments):
                self._input += arguments
                yield self._delta(type="input_json_delta", partial_json=arguments)
            case events.AnswerFinished(_, reason, stop):
                yield from self._end()
                self._message.stop_reason = _stop_reason(reason, stop)
                self._message.stop_sequence = stop if self._message.stop_reason == "stop_sequence" else None
            case events.UsageReported(usage):
                yield from self._finish(usage)

    def result(self) -> AnsweredMessage:
        """The message."""
        return self._message

    def dump(self, body: BaseModel) -> str:
        """A body or an event as JSON, with all its fields."""
        return body.model_dump_json()

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream with an error."""
        return f"event: error\ndata: {error.anthropic_body()}\n\n".encode()

    def _begin(self, block: AnsweredBlock) -> Iterator[TypedEvent]:
        yield from self._end()
        self._open, self._input = block, ""
        self._message.content.append(block)
        yield TypedEvent.of("content_block_start", index=self._index, content_block=block.model_dump())

    def _end(self) -> Iterator[TypedEvent]:
        block = self._open
        if block is None:
            return
        if isinstance(block, AnsweredThinking):
            block.signature = _SIGNATURE
            yield self._delta(type="signature_delta", signature=_SIGNATURE)
        elif isinstance(block, AnsweredCall):
            block.input = call_values(self._input)
        yield TypedEvent.of("content_block_stop", index=self._index)
        self._open = None

    def _finish(self, usage: events.AnswerUsage) -> Iterator[TypedEvent]:
        message = self._message
        message.usage = MessageUsage(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
        )
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        yield TypedEvent.of("message_delta", delta=delta, usage=message.usage.model_dump())
        yield TypedEvent.of("message_stop")

    def _delta(self, **delta: Any) -> TypedEvent:
        return TypedEvent.of("content_block_delta", index=self._index, delta=delta)

    @property
    def _index(self) -> int:
        return len(self._message.content) - 1


def _stop_reason(reason: events.FinishReason, stop: str | None) -> StopReason:
    if reason == "length":
        return "max_tokens"
    if reason == "tool_calls":
        return "tool_use"
    return "end_turn" if stop is None else "stop_sequence"
