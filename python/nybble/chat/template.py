"""Chat templates: write a conversation as the prompt that a model was trained on.

A template is a Jinja program from an untrusted file. It runs in Jinja's immutable sandbox, which denies access to
Python, and within limits on resources (`nybble.chat.template_limits`): length and nesting of the source are checked
before it is parsed, and every operation costs steps while it runs.
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
        source: The Jinja source.
        where: The name of the template in errors.
        limits: The limits on its resources.

    Raises:
        ModelError: The source is invalid, too long or nested too deeply.
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
        except Exception as error:  # Jinja and Python's compiler raise many kinds of errors on invalid input.
            raise ModelError(f"{self._where}: {_one_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Writes a conversation as a prompt.

        Args:
            messages: The turns, `[{"role": "user", "content": "Hello"}]`.
            **variables: More variables of the template. `add_generation_prompt` is false by default.

        Returns:
            The prompt.

        Raises:
            ModelError: The template fails, refuses the messages, or exceeds its limits.
            TypeError: `messages` is not a list of dicts, or a value in a message has the wrong type.
            ValueError: A message has no role or no content.
        """
        known = {
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
            **variables,
            "messages": _turns(messages),
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


def _turns(messages: object) -> list[dict[str, Any]]:
    """Returns the messages as dicts, each with a role, and content or what may replace it."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: found {type(messages).__name__}, expected a list of messages")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise TypeError(f'{where}: found {type(message).__name__}, expected a dict with "role" and "content"')
        for key in ("role", "content"):
            if key not in message and not (key == "content" and _INSTEAD_OF_CONTENT & message.keys()):
                keys = ", ".join(repr(each) for each in message) or "none"
                raise ValueError(f"{where}: found no {key!r} (keys: {keys}), expected a role and content")
        role, content = message["role"], message.get("content")
        if not isinstance(role, str):
            raise TypeError(f"{where}: role: found {type(role).__name__}, expected str")
        if content is not None and not isinstance(content, (str, Sequence, Mapping)):
            raise TypeError(f"{where}: content: found {type(content).__name__}, expected str or a list of parts")
    return [message if isinstance(message, dict) else dict(message) for message in messages]


_INSTEAD_OF_CONTENT = {"tool_calls", "function_call", "reasoning_content", "thinking"}
"""Keys of messages that may have no content."""


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
