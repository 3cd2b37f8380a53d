"""The form of an answer: JSON Schema, regular expression or grammar, under the names of several servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from nybble.chat.tools.grammar import AnswerForm
from nybble.constraints.gbnf import is_gbnf, lark_of_gbnf
from nybble.server.protocols.strict import Strict

Json = dict[str, Any]
Source = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]
Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=1000)]


class JsonSchema(Strict):
    """A JSON Schema that the answer follows."""

    name: str | None = Field(default=None, max_length=200)
    description: str | None = None
    # "schema" is a method of pydantic's models.
    definition: Json = Field(alias="schema")
    strict: bool | None = Field(default=None, description="Ignored: the answer always follows the schema strictly.")


class ResponseFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    definition: Json | None = Field(
        default=None, alias="schema", description="A JSON Schema, as llama-server takes it next to the type."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        given = [name for name in ("json_schema", "definition") if getattr(self, name) is not None]
        if len(given) == 2:
            raise PydanticCustomError("invalid", "json_schema and schema exclude each other")
        if self.type == "json_schema" and not given:
            raise PydanticCustomError("invalid", "type json_schema requires json_schema")
        if (self.type == "text" and given) or (self.type == "json_object" and self.json_schema is not None):
            raise PydanticCustomError("invalid", "type {type} excludes json_schema", {"type": self.type})
        return self

    def answer_form(self) -> AnswerForm | None:
        """The JSON Schema that the answer follows; None for plain text."""
        if self.json_schema is not None:
            return AnswerForm(self.json_schema.definition, "response_format.json_schema.schema")
        if self.definition is not None:
            return AnswerForm(self.definition, "response_format.schema")
        return AnswerForm({"type": "object"}, "response_format") if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """The form of the answer, as vLLM takes it: exactly one of its members."""

    # "json" is a method of pydantic's models.
    definition: Json | Source | None = Field(default=None, alias="json")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = Field(default=None, description="Ignored.")
    disable_any_whitespace: bool | None = Field(default=None, description="Ignored: there is never free white space.")
    disable_additional_properties: bool | None = Field(default=None, description="Ignored.")


@dataclass(frozen=True)
class Form:
    """A constraint, and the parameter of the request that holds it."""

    kind: Literal["schema", "regex", "grammar"]
    value: Any
    parameter: str


class Formed(Strict):
    """The parameters of a request that give its answers a form. At most one of them may be set."""

    response_format: ResponseFormat | None = None
    regex: Source | None = Field(
        default=None, description="Extension of nybble: a regular expression that the whole answer matches."
    )
    grammar: Source | None = Field(
        default=None,
        description="Extension of nybble: a grammar that the whole answer follows, in Lark's syntax or in GBNF.",
    )
    structured_outputs: StructuredOutputs | None = Field(default=None, description="As vLLM takes it.")
    guided_json: Json | Source | None = Field(default=None, description="As earlier versions of vLLM take it.")
    guided_regex: Source | None = Field(default=None, description="As earlier versions of vLLM take it.")
    guided_choice: Choices | None = Field(default=None, description="As earlier versions of vLLM take it.")
    guided_grammar: Source | None = Field(default=None, description="As earlier versions of vLLM take it.")
    json_schema: Json | None = Field(default=None, description="A JSON Schema, as llama-server takes it.")

    @model_validator(mode="after")
    def _check_forms(self) -> Formed:
        self.form()
        return self

    def form(self) -> Form | None:
        """The constraint of the answers; None if there is none."""
        found = [form for form in self._forms() if form is not None]
        if len(found) > 1:
            names = " and ".join(form.parameter for form in found[:2])
            raise PydanticCustomError("invalid", "{names} exclude each other: give one of them", {"names": names})
        return found[0] if found else None

    def answer_form(self) -> AnswerForm | None:
        """The JSON Schema that the answers follow; None if there is none."""
        form = self.form()
        return AnswerForm(form.value, form.parameter) if form is not None and form.kind == "schema" else None

    def form_options(self) -> dict[str, Any]:
        """The constraint as an option of `nybble.SamplingOptions`."""
        form = self.form()
        return {} if form is None else {form.kind: form.value}

    def form_parameters(self) -> dict[str, str]:
        """The parameter of the request by option, for errors."""
        form = self.form()
        return {} if form is None else {form.kind: form.parameter}

    def _forms(self) -> Iterator[Form | None]:
        if self.response_format is not None and (answer := self.response_format.answer_form()) is not None:
            yield Form("schema", answer.schema, answer.parameter)
        outputs, name = self.structured_outputs or StructuredOutputs(), "structured_outputs"
        yield _schema(outputs.definition, f"{name}.json")
        yield _schema({"type": "object"} if outputs.json_object else None, f"{name}.json_object")
        yield _schema(self.guided_json, "guided_json")
        yield _schema(self.json_schema, "json_schema")
        for regex, parameter in (
            (self.regex, "regex"), (outputs.regex, f"{name}.regex"), (self.guided_regex, "guided_regex"),
        ):  # fmt: skip
            yield None if regex is None else Form("regex", regex, parameter)
        for grammar, parameter in (
            (self.grammar, "grammar"), (outputs.grammar, f"{name}.grammar"), (self.guided_grammar, "guided_grammar"),
        ):  # fmt: skip
            yield _grammar(grammar, parameter)
        for choices, parameter in ((outputs.choice, f"{name}.choice"), (self.guided_choice, "guided_choice")):
            if choices is not None:
                rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
                yield Form("grammar", f"start: {rule}", parameter)


def _schema(schema: Json | str | None, parameter: str) -> Form | None:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise PydanticCustomError("invalid", "{name}: expected a JSON Schema", {"name": parameter})
    return None if schema is None else Form("schema", schema, parameter)


def _grammar(text: str | None, parameter: str) -> Form | None:
    if text is None:
        return None
    if is_gbnf(text):
        try:
            text = lark_of_gbnf(text)
        except ValueError as error:
            raise PydanticCustomError("invalid", "{name}: {why}", {"name": parameter, "why": str(error)}) from None
    return Form("grammar", text, parameter)
