"""Grammars that make a model write a tool call, or either calls or an answer in a given form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.chat.tools.syntaxes.json_calls import JsonCalls
from nybble.chat.tools.syntaxes.rules import AllowedFunction, CallRules, arguments_schema, json_rule
from nybble.chat.tools.tool_format import Function, ToolFormat

Schema = Any


@dataclass(frozen=True)
class AnswerForm:
    """The JSON Schema that an answer follows, and the parameter of the request that holds it."""

    schema: Schema
    parameter: str


class CallGrammar:
    """Writes grammars for the calls of some functions.

    Args:
        tool_format: How the model writes calls.
        functions: The functions that may be called.
        parameters: The parameters of the request that hold the schemas of the functions, for errors.
        special_token: Gives the id of a marker that is a special token, or None.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        functions: Sequence[Function],
        parameters: Sequence[str],
        special_token: Callable[[str], int | None],
    ) -> None:
        self._format = tool_format
        tokens = {marker: special_token(marker) for marker in (*tool_format.markers, *tool_format.tokens)}
        self._rules = CallRules(
            [
                AllowedFunction(function.name, arguments_schema(function.parameters), parameter)
                for function, parameter in zip(functions, parameters, strict=True)
            ],
            {marker: token for marker, token in tokens.items() if token is not None},
        )

    def forced(self) -> tuple[str, str]:
        """The text that an answer begins with, which is an opening marker, and the grammar of the rest: one call.

        Raises:
            SchemaError: A schema is invalid or cannot be enforced.
        """
        known = self._format
        prefix = "" if known.bare else (known.section[0] + known.opening).removeprefix(known.prompted)
        return prefix, "\n".join(["start: named", *known.syntax.rules(self._rules)])

    def calls_or(self, form: AnswerForm, *, several: bool) -> str:
        """The grammar of an answer that is either calls or JSON in a form.

        Args:
            form: The form.
            several: Whether there may be more than one call.

        Raises:
            SchemaError: A schema is invalid or cannot be enforced.
        """
        known, text = self._format, self._rules.text
        if known.bare and isinstance(known.syntax, JsonCalls):
            # Calls look like answers until their names, so both belong to one schema.
            return "\n".join(["start: named", *known.syntax.rules(self._rules, form=(form.schema, form.parameter))])
        answer = [json_rule([(form.schema, form.parameter)], lambda found: found[0])]
        heading = known.text_opening.removeprefix(known.prompted)
        rules = [
            "start: calls | answer",
            " ".join(filter(None, ["answer:", text(heading) if heading else "", "form"])),
            f"form: {answer[0]}",
            *known.syntax.rules(self._rules, several=several and known.syntax.as_list),
        ]
        opening, closing = ("" if known.bare else known.opening), "".join(known.closing)
        if known.bare or known.ends_turn:
            closing = ""
        begin, end = (known.section[0] + opening).removeprefix(known.prompted), known.section[1]
        first = ["calls:", text(begin) if begin else "", "named", text(closing) if closing else ""]
        # The line break before the end may come before another call, too, so it is a literal of its own.
        lines = ['"\\n"', end[1:]] if end.startswith("\n") else ["", end]
        if several and not known.syntax.as_list and not known.ends_turn:
            between = text(known.separator + opening) if known.separator + opening else ""
            first.append(" ".join(filter(None, ["(", between, "named", text(closing) if closing else "", ")*"])))
        rules.append(" ".join(filter(None, [*first, lines[0], text(lines[1]) if end else ""])))
        return "\n".join(rules)
