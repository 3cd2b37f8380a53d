"""Grammars that make a model write a tool call, or either calls or an answer in a given form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.constraints.schema import combined
from nybble.server.tools import reader
from nybble.server.tools.arguments import element_rules
from nybble.server.tools.formats import Function, ToolFormat

Json = dict[str, Any]
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
        self._functions = functions
        self._parameters = parameters
        self._special_token = special_token

    def forced(self) -> tuple[str, str]:
        """The text that an answer begins with, which is an opening marker, and the grammar of the rest: one call.

        Raises:
            SchemaError: A schema is invalid or cannot be enforced.
        """
        known = self._format
        if self._writes_json:
            prefix = "" if known.bare else f"{known.opening}\n" if known.closing else known.opening
            return prefix, f"start: {self._json_calls()}"
        prefix = f"{known.opening}\n<function=" if known.syntax is reader.tagged else known.opening
        return prefix, "\n".join(["start: named", *self._named_rules()])

    def calls_or(self, form: AnswerForm, *, several: bool) -> str:
        """The grammar of an answer that is either calls or JSON in a form.

        Args:
            form: The form.
            several: Whether there may be more than one call.

        Raises:
            SchemaError: A schema is invalid or cannot be enforced.
        """
        known = self._format
        if known.bare:  # Calls look like answers until their names, so both belong to one schema.
            return f"start: {self._json_calls(form)}"
        rules = [
            "start: calls | answer",
            f"answer: {_json_rule([(form.schema, form.parameter)], lambda found: found[0])}",
        ]
        if self._writes_json:
            rules.append(f"named: {self._json_calls(several=several)}")
            around = '"\\n"' if known.closing else ""
        else:
            rules += self._named_rules()
            around = '"\\n"' if known.syntax is reader.tagged else ""
        head = '"<function="' if known.syntax is reader.tagged else ""
        opening, closing = self._marker(known.opening), self._marker(known.closing) if known.closing else ""
        rules.append(" ".join(["call:", opening, around, head, "named", around, closing]))
        repeats = several and not known.as_list
        rules.append(f"calls: call ({self._separator} call)*" if repeats else "calls: call")
        return "\n".join(rules)

    @property
    def _writes_json(self) -> bool:
        return self._format.syntax is reader.json_objects or self._format.as_list

    @property
    def _separator(self) -> str:
        return '"\\n"' if self._format.closing else ""

    def _marker(self, text: str) -> str:
        token = self._special_token(text)
        return json.dumps(text, ensure_ascii=False) if token is None else f"<[{token}]>"

    def _json_calls(self, form: AnswerForm | None = None, *, several: bool = False) -> str:
        """A rule for calls as JSON objects, or for answers in a form as an alternative."""
        functions, key = self._functions, self._format.arguments_key

        def build(arguments: list[Schema]) -> Schema:
            choices: list[Schema] = [
                {
                    "type": "object",
                    "properties": {"name": {"const": function.name}, key: schema},
                    "required": ["name", key],
                    "additionalProperties": False,
                }
                for function, schema in zip(functions, arguments, strict=False)
            ]
            choices += arguments[len(functions) :]
            found = choices[0] if len(choices) == 1 else {"anyOf": choices}
            limit = {} if several else {"maxItems": 1}
            return {"type": "array", "items": found, "minItems": 1, **limit} if self._format.as_list else found

        schemas = [
            (arguments_schema(function.parameters), parameter)
            for function, parameter in zip(functions, self._parameters, strict=True)
        ]
        if form is not None:
            schemas.append((form.schema, form.parameter))
        return _json_rule(schemas, build)

    def _named_rules(self) -> list[str]:
        """Rules of one call from the name of its function on; `named` is the first."""
        args_token = self._special_token("[ARGS]")
        if self._format.syntax is reader.name_then_json:
            after_name = '">"'
        else:
            after_name = '"[ARGS]"' if args_token is None else f"<[{args_token}]>"
        rules = ["named: " + " | ".join(f"f{index}" for index in range(len(self._functions)))]
        for index, (function, parameter) in enumerate(zip(self._functions, self._parameters, strict=True)):
            schema, rule = arguments_schema(function.parameters), f"f{index}"
            if self._format.syntax is reader.tagged:
                rules += element_rules(rule, function.name, schema, parameter)
            else:
                body = _json_rule([(schema, parameter)], lambda found: found[0])
                rules += [f'{rule}: "{function.name}" {after_name} {rule}_a', f"{rule}_a: {body}"]
        return rules


def arguments_schema(parameters: Mapping[str, Any] | None) -> Json:
    """The JSON Schema of the arguments of a function. Without parameters it has no arguments."""
    if not parameters:
        return {"type": "object", "properties": {}}
    return {**parameters, "type": parameters.get("type", "object")}


def _json_rule(schemas: Sequence[tuple[Schema, str]], build: Callable[[list[Schema]], Schema]) -> str:
    return f"%json {json.dumps(combined(schemas, build))}"
