"""`/v1/chat/completions`: a conversation in, messages and tool calls out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from nybble.chat.tools.formats import HERMES, detect_format
from nybble.chat.tools.grammar import CallGrammar
from nybble.chat.tools.parser import AnswerParser, PlainText, ToolCallParser
from nybble.chat.tools.reader import new_id
from nybble.chat.tools.support import tool_support
from nybble.chat.tools.tool_format import ToolFormat
from nybble.generation import TokenLogprob
from nybble.generation.reasoning import chat_prompt
from nybble.generation.request import check_length
from nybble.sampling import SamplingOptions
from nybble.server.errors import ApiError
from nybble.server.events import (
    AnswerFinished,
    AnswerStarted,
    AnswerUsage,
    CollectedAnswer,
    Event,
    FinishReason,
    LogprobsDelta,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
    UsageReported,
)
from nybble.server.generation import GenerationRequest, Prompt
from nybble.server.protocols import chat_schema as schema
from nybble.server.protocols.adapter import CollectingAdapter
from nybble.server.protocols.chat_schema import (
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    Delta,
    FunctionDefinition,
)
from nybble.server.protocols.schema import Usage, finite
from nybble.server.service import Service
from nybble.tokenizer.tokenizer import Tokenizer


class ChatAdapter(CollectingAdapter):
    """A request for chat completions."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        super().__init__(body.model, body.n or 1, bool(body.stream))
        self._model = service.engine.model
        self._tokenizer = self._model.tokenizer
        self._reads_unmarked_calls = service.settings.bare_calls
        self._body = body
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{new_id()}",
            "created": service.now(),
            "model": service.name_of(body.model),
        }
        self._pending: list[list[ChatLogprob]] = [[] for _ in range(self.answers)]
        """Log-probabilities for the next chunk of each answer."""

    def translate(self) -> GenerationRequest:
        """The conversation, written by the chat template, and a parser for the tool calls of the answers."""
        body = self._body
        tool_format = self._tool_format()
        choice, form = body.choice(), body.answer_form()
        must_call = choice not in ("auto", "none")
        given = body.form()
        if must_call and tool_format is not None and given is not None and given.kind != "schema":
            message = f"{given.parameter} cannot be combined with a required tool call"
            raise ApiError(400, message, param=given.parameter)
        functions = {
            parameter: function
            for parameter, function in body.callable_functions().items()
            if choice in ("auto", "required", f"function {function.name}")
        }
        described = [
            {"type": "function", "function": function.model_dump(exclude_unset=True)}
            for function in body.callable_functions().values()
        ]
        writes_grammar = tool_format is not None and (must_call or form is not None)
        prefix = ""

        def prepare() -> list[tuple[Prompt, SamplingOptions]]:
            nonlocal prefix
            options = body.options()
            if tool_format is not None and writes_grammar:
                options.pop("schema", None)
                grammar = CallGrammar(tool_format, [*functions.values()], [*functions], self._special_token)
                if must_call:
                    prefix, options["grammar"] = grammar.forced()
                elif form is not None:
                    options["grammar"] = grammar.calls_or(form, several=self._allows_several)
            messages: Sequence[Mapping[str, Any]] = [message.for_template() for message in body.messages]
            tools: Sequence[Mapping[str, Any]] | None = described if tool_format is not None else None
            template = self._chat_template(with_tools=bool(tools))
            if tools or (detect_format(template) and any("tool_calls" in message for message in messages)):
                messages, tools = tool_support(template).prepare(messages, tools or ())
            prompt, budget = chat_prompt(
                self._tokenizer,
                messages,
                choice=body.reasoning_choice(),
                tools=tools,
                variables=body.chat_template_kwargs,
                continues=body.continues,
                answers_now=must_call,
                constrained=not options.keys().isdisjoint(("schema", "regex", "grammar")),
            )
            if body.separates_reasoning or body.reasoning_choice().budget is not None:
                options["reasoning_budget"] = budget
            check_length(self._model, prompt)
            ids = self._tokenizer.encode_prompt(prompt + prefix)
            return [(ids, SamplingOptions(**options, seed=seed)) for seed in body.seeds(self.answers)]

        def new_parser() -> AnswerParser:
            if tool_format is None:
                return PlainText()
            unmarked = self._reads_unmarked_calls and form is None and not must_call
            return self._tool_parser(tool_format, [*functions.values()], prefix, unmarked)

        parameters = body.form_parameters() | ({"grammar": "tools"} if writes_grammar else {})
        return GenerationRequest(
            param="messages",
            prepare=prepare,
            parameters=parameters,
            new_parser=new_parser,
            separates_reasoning=body.separates_reasoning,
        )

    def _chat_template(self, with_tools: bool) -> str:
        """The source of the chat template for requests with tools, or without."""
        templates = self._tokenizer.chat_templates
        default = templates.get("default", "")
        return templates.get("tool_use", default) if with_tools else default

    def _tool_format(self) -> ToolFormat | None:
        """The format in which the model writes tool calls; None for a request without tools."""
        if not self._body.callable_functions() or self._body.choice() == "none":
            return None
        return detect_format(self._chat_template(with_tools=True)) or HERMES

    def _tool_parser(
        self, tool_format: ToolFormat, functions: Sequence[FunctionDefinition], prefix: str, unmarked: bool
    ) -> ToolCallParser:
        tokens = {self._special_token(marker): marker for marker in tool_format.markers}
        parser = ToolCallParser(
            tool_format,
            {function.name: function.parameters for function in functions},
            {token: marker for token, marker in tokens.items() if token is not None},
            stream=self.streams,
            parallel=self._allows_several,
            unmarked=unmarked,
        )
        parser.push(prefix, ())
        return parser

    def _special_token(self, text: str) -> int | None:
        """The id of a special token, which decodes to no text; None if `text` is not a special token."""
        token = self._tokenizer.id_of(text)
        return token if token in self._tokenizer.special_ids else None

    @property
    def _allows_several(self) -> bool:
        """Whether an answer may have several calls."""
        return self._body.parallel_tool_calls is not False and not self._body.uses_functions

    def response(self, answers: Sequence[CollectedAnswer], usage: AnswerUsage) -> ChatCompletion:
        """The completion that holds all answers."""
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=Usage.of(usage),
        )

    def _choice(self, index: int, answer: CollectedAnswer) -> schema.ChatChoice:
        message = schema.Answer(role="assistant", content=answer.text, refusal=None)
        if answer.reasoning and self._body.shows_reasoning:
            message.reasoning_content = answer.reasoning
        if answer.calls:
            message.content = answer.text or None
        if answer.calls and self._body.uses_functions:
            (call,) = answer.calls
            message.function_call = schema.CalledFunction(name=call.name, arguments=call.arguments)
        elif answer.calls:
            message.tool_calls = [
                schema.Call(
                    id=call.id,
                    type="function",
                    function=schema.CalledFunction(name=call.name, arguments=call.arguments),
                )
                for call in answer.calls
            ]
        return schema.ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(described_logprobs(self._tokenizer, answer.logprobs)),
            finish_reason=self._reason(answer.reason),
        )

    def _reason(self, reason: FinishReason) -> FinishReason | Literal["function_call"]:
        return "function_call" if reason == "tool_calls" and self._body.uses_functions else reason

    def chunks(self, event: Event) -> Iterator[ChatChunk]:
        """The chunks of an event."""
        match event:
            case AnswerStarted(answer):
                yield self._chunk(answer, Delta(role="assistant", content=""))
            case LogprobsDelta(answer, tokens):
                self._pending[answer] += described_logprobs(self._tokenizer, tokens)
            case TextDelta(answer, text):
                if text:
                    yield self._chunk(answer, Delta(content=text))
            case ReasoningDelta(answer, text):
                if text and self._body.shows_reasoning:
                    yield self._chunk(answer, Delta(reasoning_content=text))
            case ToolCallStarted(answer, call, id, name):
                function = schema.FunctionDelta(name=name, arguments="")
                delta = schema.CallDelta(index=call, id=id, type="function", function=function)
                yield self._call_chunk(answer, delta)
            case ToolCallDelta(answer, call, arguments):
                function = schema.FunctionDelta(arguments=arguments)
                yield self._call_chunk(answer, schema.CallDelta(index=call, function=function))
            case AnswerFinished(answer, reason):
                yield self._chunk(answer, Delta(), reason)
            case UsageReported(usage):
                if self._body.wants_usage:
                    yield ChatChunk(**self._head, object="chat.completion.chunk", choices=[], usage=Usage.of(usage))

    def _call_chunk(self, answer: int, delta: schema.CallDelta) -> ChatChunk:
        if self._body.uses_functions:
            return self._chunk(answer, Delta(function_call=delta.function))
        return self._chunk(answer, Delta(tool_calls=[delta]))

    def _chunk(self, answer: int, delta: Delta, reason: FinishReason | None = None) -> ChatChunk:
        pending, self._pending[answer] = self._pending[answer], []
        choice = schema.ChunkChoice(
            index=answer,
            delta=delta,
            logprobs=self._logprobs(pending) if pending else None,
            finish_reason=None if reason is None else self._reason(reason),
        )
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, content: list[ChatLogprob]) -> ChatLogprobs | None:
        return ChatLogprobs(content=content, refusal=None) if self._body.logprobs else None


def described_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> list[ChatLogprob]:
    """The log-probabilities of tokens as clients of OpenAI's APIs receive them."""

    def described(token: int, text: str, logprob: float) -> dict[str, Any]:
        # Ids that only pad the model's matrices have no bytes.
        written = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
        return {"token": text, "logprob": finite(logprob), "bytes": list(written)}

    return [
        ChatLogprob(
            **described(found.token, found.text, found.logprob),
            top_logprobs=[schema.TopLogprob(**described(*other)) for other in found.top],
        )
        for found in tokens
    ]
