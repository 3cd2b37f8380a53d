"""Chat templates: a conversation becomes the text that a model was trained on.

A template is a Jinja program out of a file that anybody may have written, so it runs in Jinja's immutable sandbox,
which keeps it away from Python, and within limits, which keep it from taking the machine: how deep and long its source
may be is checked before it is parsed, and everything it does costs steps while it runs (`nybble.template_limits`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

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
        source: the Jinja source.
        where: what errors call it.
        limits: how far it may go.

    Raises:
        ModelError: the source is broken, or larger or deeper than the limits allow.
    """

    def __init__(self, source: str, where: str = "chat template", limits: Limits = DEFAULT_LIMITS) -> None:
        self._where = where
        self._limits = limits
        self._code = self._compile(source)

    def _compile(self, source: str) -> CodeType:
        environment = _environment(self._limits)
        try:
            check_source(environment, source, self._limits)
            return environment.compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self._where}: line {error.lineno}: {error.message}") from error
        except Exception as error:  # Jinja and Python's compiler fail in many ways on broken input.
            raise ModelError(f"{self._where}: {_one_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Writes a conversation.

        Args:
            messages: the turns, `[{"role": "user", "content": "Hello"}]`.
            **variables: what else the template may look at; `add_generation_prompt` is false if not given.

        Raises:
            ModelError: the template fails, refuses the messages, or goes beyond its limits.
        """
        known = {
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
            **variables,
            "messages": _turns(messages),
        }
        # One environment a call: it is quickly made, and it counts the steps of this call alone.
        environment = _environment(self._limits)
        template = environment.template_class.from_code(environment, self._code, environment.make_globals(None))
        try:
            return "".join(template.root_render_func(template.new_context(known)))
        except _Refused as error:
            raise ModelError(f"{self._where} refuses the messages: {error}") from error
        except LimitsExceeded as error:
            raise ModelError(f"{self._where}: {error}") from error
        except Exception as error:  # Whatever a program can do wrong.
            raise ModelError(f"{self._where} fails: {type(error).__name__}: {_one_line(error)}") from error


def _turns(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: found {type(messages).__name__}, expected a list of messages")
    for message in messages:
        if not isinstance(message, Mapping):
            raise TypeError(f"messages: found a {type(message).__name__} among them, expected a dict")
    return [message if isinstance(message, dict) else dict(message) for message in messages]


class _Refused(jinja2.TemplateError):
    """The template itself found fault with the messages."""


class _Generation(Extension):
    """`{% generation %}` marks the model's own words for training. For writing a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012  Declared so by Jinja.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment(limits: Limits) -> GuardedEnvironment:
    """What templates find around them, as Hugging Face's `transformers` gives it to them."""
    environment = GuardedEnvironment(limits, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _GUARDED_TO_JSON
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"\d", pattern):
        raise ValueError("strftime_now: found a pattern that is long or pads to a width")
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it: Jinja's own filter would escape letters for HTML."""
    if indent is not None and indent not in range(17):
        raise ValueError(f"tojson: found indent={indent!r}, expected at most 16")
    if separators is not None and any(len(separator) > 16 for separator in separators):
        raise ValueError("tojson: found a separator of more than 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_GUARDED_TO_JSON = guarded("tojson", _to_json)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
