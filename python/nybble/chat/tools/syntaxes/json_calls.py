"""Calls as JSON objects: `{"name": ..., "arguments": {...}}`, alone or in a list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nybble.chat.tools.reader import NotACallError, Reader, Steps
from nybble.chat.tools.syntaxes.rules import AllowedFunction, Call, CallRules, Schema, json_rule


@dataclass(frozen=True)
class JsonCalls:
    """JSON objects that name a function and hold its arguments."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    """The key of the arguments, next to that of the name."""
    as_list: bool = False
    """The objects are elements of a list."""
    extra: Mapping[str, Schema] = field(default_factory=dict)
    """More keys of an object before the name, with their schemas. Each holds the number of the call."""

    tokens: tuple[str, ...] = ()

    @property
    def starts(self) -> str:
        """The characters with which calls without a marker begin."""
        return "{[" if self.as_list else "{"

    def read(self, reader: Reader) -> Steps[None]:
        """Reads one object, or a list of objects."""
        yield from reader.objects((yield from reader.next_non_space()), self._object)

    def _object(self, reader: Reader, first: str) -> Steps[None]:
        if first != "{":
            raise NotACallError
        name: str | None = None
        early: str | None = None  # Arguments that come before the name are kept until the name is known.
        emitted = quoted = False
        following = ","
        while following == ",":
            key = yield from reader.string((yield from reader.next_non_space()))
            if (yield from reader.next_non_space()) != ":":
                raise NotACallError
            value = yield from reader.next_non_space()
            if key in ("name", self.name_key) and name is None:
                name = yield from reader.string(value)
            elif key == "function" and name is None and early is None and value in '"{':
                name, early = yield from _function(reader, value)
            elif key in ("arguments", "parameters") and not emitted and early is None and value != "n":
                if value == '"':
                    early, quoted = (yield from reader.string(value)), True
                elif name is None:
                    parts: list[str] = []
                    yield from reader.value(value, parts.append)
                    early = "".join(parts)
                else:
                    reader.begin(name)
                    yield from reader.value(value, reader.emit)
                    emitted = True
            else:  # Also null, which stands for no arguments.
                yield from reader.value(value, len)
            if name is not None and early is not None and not emitted:
                reader.begin(name, quoted)
                reader.emit(early)
                emitted = True
            following = yield from reader.next_non_space()
        if following != "}" or name is None:
            raise NotACallError
        if not emitted:
            reader.begin(name)
            reader.emit("{}")

    def rules(self, rules: CallRules, *, several: bool = False, form: tuple[Schema, str] | None = None) -> list[str]:
        """The rule `named`: one call, or with `several` and a list any number, or JSON in a form."""

        def build(arguments: list[Schema]) -> Schema:
            functions = rules.functions
            choices = [
                self._object_schema(each, schema) for each, schema in zip(functions, arguments, strict=False)
            ] + arguments[len(functions) :]
            found = choices[0] if len(choices) == 1 else {"anyOf": choices}
            limit = {} if several else {"maxItems": 1}
            return {"type": "array", "items": found, "minItems": 1, **limit} if self.as_list else found

        schemas = [(each.schema, each.parameter) for each in rules.functions]
        return [f"named: {json_rule([*schemas, *([form] if form is not None else [])], build)}"]

    def _object_schema(self, function: AllowedFunction, arguments: Schema) -> Schema:
        """The schema of a call of a function."""
        keys = {**self.extra, self.name_key: {"const": function.name}, self.arguments_key: arguments}
        return {"type": "object", "properties": keys, "required": [*keys], "additionalProperties": False}

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers. Numbering begins with `number`."""
        objects = [
            {**dict.fromkeys(self.extra, str(number + index)), self.name_key: name, self.arguments_key: arguments}
            for index, (name, arguments) in enumerate(calls)
        ]
        if self.as_list:
            return json.dumps(objects, ensure_ascii=False)
        return "\n".join(json.dumps(each, ensure_ascii=False) for each in objects)


@dataclass(frozen=True)
class KeyedJsonCalls:
    """A list of JSON objects whose key is the name of a function: `[{"NAME": {...}}]`."""

    starts = "{["
    as_list = True
    tokens: tuple[str, ...] = ()

    def read(self, reader: Reader) -> Steps[None]:
        """Reads one object, or a list of objects. An object may hold several calls."""
        yield from reader.objects((yield from reader.next_non_space()), self._object)

    def _object(self, reader: Reader, first: str) -> Steps[None]:
        if first != "{":
            raise NotACallError
        following = ","
        while following == ",":
            name = yield from reader.string((yield from reader.next_non_space()))
            yield from reader.expect(":")
            if (value := (yield from reader.next_non_space())) != "{":
                raise NotACallError
            reader.begin(name)
            yield from reader.value(value, reader.emit)
            following = yield from reader.next_non_space()
        if following != "}":
            raise NotACallError

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """The rule `named`: a list of one call, or with `several` of any number."""

        def build(arguments: list[Schema]) -> Schema:
            choices: list[Schema] = [
                {
                    "type": "object",
                    "properties": {each.name: schema},
                    "required": [each.name],
                    "additionalProperties": False,
                }
                for each, schema in zip(rules.functions, arguments, strict=True)
            ]
            found = choices[0] if len(choices) == 1 else {"anyOf": choices}
            return {"type": "array", "items": found, "minItems": 1, **({} if several else {"maxItems": 1})}

        return [f"named: {json_rule([(each.schema, each.parameter) for each in rules.functions], build)}"]

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers."""
        return json.dumps([{name: arguments} for name, arguments in calls], ensure_ascii=False)


def _function(reader: Reader, first: str) -> Steps[tuple[str | None, str | None]]:
    """The name and perhaps the arguments under the key `function`: `"NAME"` or `{"name": ..., "arguments": {...}}`."""
    parts: list[str] = []
    yield from reader.value(first, parts.append)
    try:
        value = json.loads("".join(parts), strict=False)
    except (ValueError, RecursionError):
        raise NotACallError from None
    if not isinstance(value, dict):
        return value, None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str):
        return None, None
    if isinstance(arguments, str):
        return name, arguments or "{}"
    return name, None if arguments is None else json.dumps(arguments, ensure_ascii=False)
