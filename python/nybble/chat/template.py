"""Chat templates: write a conversation as the prompt that a model was trained on.

A template is a Jinja program from an untrusted file. It runs in Jinja's immutable sandbox, which denies access to
Python, and within limits on resources (`nybble.chat.template_limits`): length and nesting of the source are checked
before it is parsed, and every operation costs steps while it runs.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from nybble.chat.conversation import cut_after_end, mark_end, plain, turns
from nybble.chat.reasoning import for_template
from nybble.chat.template_limits import (
    DEFAULT_LIMITS,
    GuardedEnvironment,
    Limits,
    LimitsExceeded,
    check_source,
    guarded,
)
from nybble.errors import ModelError


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja source.
        where: The name of the template in errors.
        limits: The limits on its resources.

    Raises:
        ModelError: The source is invalid, too long or nested too deeply.
    """

    def __init__(self, source: str, where: str = "chat template", limits: Limits = DEFAULT_LIMITS) -> None:
        self._where = where
        self._limits = limits
        self._source = source
        self._code = self._compile(source)

    def _compile(self, source: str) -> CodeType:
        try:
            return _compiled(source, self._limits)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self._where}: line {error.lineno}: {error.message}") from error
        except Exception as error:  # Jinja and Python's compiler raise many kinds of errors on invalid input.
            raise ModelError(f"{self._where}: {_one_line(error)}") from error

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads, those that it sets itself aside."""
        # The source has been checked, and compiled.
        return frozenset(jinja2.meta.find_undeclared_variables(_environment(self._limits).parse(self._source)))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, continue_final_message: bool | str = False, **variables: Any
    ) -> str:
        """Writes a conversation as a prompt.

        Args:
            messages: The turns, `[{"role": "user", "content": "Hello"}]`.
            continue_final_message: End within the last message, which the model continues, after its content or after
                the field with this name.
            **variables: More variables of the template. `add_generation_prompt` is false by default.

        Returns:
            The prompt.

        Raises:
            ModelError: The template fails, refuses the messages, or exceeds its limits.
            TypeError: `messages` is not a list of dicts, or a value in a message has the wrong type.
            ValueError: A message has no role or no content, or the last one cannot be continued.
        """
        conversation = for_template(turns(messages), self._source)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        continued = mark_end(conversation, field, self._source) if continue_final_message else None
        prompt = self._rendered(conversation, variables)
        if continued is None:
            return prompt
        if (cut := cut_after_end(prompt, continued)) is None:
            raise ValueError(f"continue_final_message: {self._where} does not write the {field} of the last message")
        return cut

    def _rendered(self, conversation: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        known = {
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
            **{name: plain(value, name) for name, value in variables.items()},
            "messages": conversation,
        }
        # Each call has its own environment, which counts the steps of this call. Making one is cheap.
        environment = _environment(self._limits)
        template = environment.template_class.from_code(environment, self._code, environment.make_globals(None))
        try:
            return "".join(template.root_render_func(template.new_context(known)))
        except _Refused as error:
            raise ModelError(f"{self._where} refuses the messages: {error}") from error
        except LimitsExceeded as error:
            raise ModelError(f"{self._where}: {error}") from error
        except Exception as error:  # A template may raise anything.
            raise ModelError(f"{self._where} fails: {type(error).__name__}: {_one_line(error)}") from error


# Servers load the same models again and again, and Jinja takes tens of milliseconds to compile a long template.
@functools.lru_cache(maxsize=128)
def _compiled(source: str, limits: Limits) -> CodeType:
    environment = _environment(limits)
    check_source(environment, source, limits)
    return environment.compile(source)


class _Refused(jinja2.TemplateError):
    """The template refuses the messages."""


class _Generation(Extension):
    """`{% generation %}` marks the model's answers for training. It has no effect on prompts."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it this way.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment(limits: Limits) -> GuardedEnvironment:
    """The environment of templates, with the functions that Hugging Face's `transformers` provides."""
    environment = GuardedEnvironment(limits, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _GUARDED_TO_JSON
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"\d", pattern):
        raise ValueError("strftime_now: the pattern is too long or contains a width")
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it. Jinja's own filter would escape characters for HTML."""
    if indent is not None and indent not in range(17):
        raise ValueError(f"tojson: found indent={indent!r}, expected at most 16")
    if separators is not None and any(len(separator) > 16 for separator in separators):
        raise ValueError("tojson: found a separator of more than 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_GUARDED_TO_JSON = guarded("tojson", _to_json)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
