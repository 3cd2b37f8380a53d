"""Resource limits for untrusted templates.

Jinja's sandbox denies access to Python's internals, but lets a template loop for hours and fill the memory, and a
library cannot stop it with signals or threads. So every operation that may take long or grow passes a guard:

- The size and nesting of the source are checked by its tokens, before the recursive parser and compilers run.
- The syntax tree is rewritten before it is compiled. The values of loops, output, `~` and containers pass filters whose
  names no template can spell. Operators, calls and filters pass methods of the environment.
- Each passage costs steps, more for large values, and one rendering may take a limited number of steps. The size of
  every value that a template makes is limited, so that no single step takes long.
"""

from __future__ import annotations

import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer


@dataclass(frozen=True)
class Limits:
    """Resource limits of a template. Real ones need far less: 30 KB of source, 8 levels, 100 steps per message."""

    source: int = 1 << 17
    """Characters of source."""
    depth: int = 64
    """Levels of nested brackets and blocks."""
    steps: int = 1_000_000
    """Steps of one rendering."""
    seconds: float = 5.0
    """Processor time of one rendering, a second limit in case the steps underestimate the cost."""
    text: int = 1 << 23
    """Characters of any value, and of the whole output."""
    elements: int = 200_000
    """Elements of any value, including those of nested values."""
    number: int = 10_000
    """The largest width or count that a template may pass to a function."""


DEFAULT_LIMITS = Limits()


class LimitsExceeded(jinja2.TemplateError):
    """The template exceeded its limits."""


# --- Before parsing ---------------------------------------------------------------------------------------------------

_OPENERS = frozenset({"autoescape", "block", "call", "filter", "for", "generation", "if", "macro", "set", "with"})
_PREFIXES = frozenset({"not", "+", "-"})


def check_source(environment: jinja2.Environment, source: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Checks the size and nesting of a template by its tokens, without recursion.

    Raises:
        LimitsExceeded: The template is too long or nested too deeply.
        jinja2.TemplateSyntaxError: Its tokens are invalid.
    """
    if len(source) > limits.source:
        raise LimitsExceeded(f"found {len(source)} characters of source, expected at most {limits.source}")
    brackets = prefixes = inline_branches = 0
    blocks: list[int] = []  # The number of branches of each open block.
    tag = ""
    for line, kind, text in environment.lex(source):
        if kind in ("block_begin", "variable_begin"):
            brackets = prefixes = inline_branches = 0
            tag = "?" if kind == "block_begin" else ""
            continue
        if kind not in ("name", "operator"):
            prefixes *= kind == "whitespace"
            continue
        if tag == "?":
            tag = text
            if tag in _OPENERS:
                blocks.append(0)
            elif blocks and tag.startswith("end"):
                blocks.pop()
            elif blocks and tag == "elif":
                blocks[-1] += 1
        elif tag == "set" and text == "=" and brackets == 0:
            tag = ""
            blocks.pop()  # This form of `set` has no end tag.
        brackets += (text in "([{") - (text in ")]}")
        prefixes = prefixes + 1 if text in _PREFIXES else 0
        inline_branches += text == "else"
        branches = blocks[-1] // 4 if blocks else 0
        if max(brackets, prefixes, inline_branches, len(blocks), branches) > limits.depth:
            raise LimitsExceeded(f"line {line}: found more than {limits.depth} levels of nesting")


# --- While running ----------------------------------------------------------------------------------------------------


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one rendering, whose steps it counts."""

    intercepted_binops: frozenset[str] = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, limits: Limits, extensions: Sequence[str | type[jinja2.ext.Extension]] = ()) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, cache_size=0)
        self.limits = limits
        self.filters: dict[str, Callable[..., Any]] = {**_FILTERS, **_GUARDS}
        del self.globals["lipsum"]
        self._steps = self._written = self._next_look = 0
        self._began = time.thread_time()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _PlaceGuards().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def step(self, cost: int = 1) -> None:
        """Counts steps.

        Raises:
            LimitsExceeded: The rendering has taken too many steps or too long.
        """
        self._steps += cost
        if self._steps > self.limits.steps:
            raise LimitsExceeded(f"it ran for more than {self.limits.steps} steps")
        if self._steps >= self._next_look:
            self._next_look = self._steps + 100
            if time.thread_time() - self._began > self.limits.seconds:
                raise LimitsExceeded(f"it ran for more than {self.limits.seconds:g} seconds")

    def write(self, value: object) -> str:
        """Counts output, of the template or of a block that sets a variable."""
        text = value if type(value) is str else str(value)
        self._written += len(text)
        if self._written > self.limits.text:
            raise LimitsExceeded(f"it wrote more than {self.limits.text} characters")
        self.step(1 + len(text) // 128)
        return text

    def made(self, value: object) -> tuple[int, int]:
        """Counts a value that the template created. Returns its elements and characters, including nested ones."""
        elements = characters = 0
        waiting = [_attributes(value) if isinstance(value, Namespace) else value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, (list, tuple, set, frozenset, Mapping)):
                elements += len(item)
                if elements <= self.limits.elements:
                    waiting.extend(item)
                    if isinstance(item, Mapping):
                        waiting.extend(item.values())
            elif isinstance(item, Namespace):
                # A counted value must not change, and a namespace can.
                raise LimitsExceeded("it put a namespace into another value")
            elif isinstance(item, int) and item.bit_length() > 1024:
                raise LimitsExceeded("it made a number of more than 1024 bits")
            if elements > self.limits.elements:
                raise LimitsExceeded(f"it made a value of more than {self.limits.elements} elements")
            if characters > self.limits.text:
                raise LimitsExceeded(f"it made a string of more than {self.limits.text} characters")
        self.step(1 + elements // 8 + characters // 128)
        return elements, characters

    def small(self, *numbers: object) -> None:
        """Checks widths and counts."""
        for number in numbers:
            if isinstance(number, int) and abs(number) > self.limits.number:
                raise LimitsExceeded(f"found the width or count {number}, expected at most {self.limits.number}")

    def fits(self, characters: int) -> None:
        """Checks the length of a string before it is created."""
        if characters > self.limits.text:
            raise LimitsExceeded(f"it would make a string of more than {self.limits.text} characters")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator after checking the size of its result."""
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    elements, characters = self.made(value)
                    if elements * count > self.limits.elements:
                        raise LimitsExceeded(f"it would make a value of more than {self.limits.elements} elements")
                    self.fits(characters * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > 1024:
                raise LimitsExceeded("it would make a number of more than 1024 bits")
        elif operator == "%" and isinstance(left, str):
            _check_percent_format(self, left)
        result = super().call_binop(context, operator, left, right)
        self.made(result)
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro."""
        self.step()
        if isinstance(function, (BuiltinMethodType, MethodType)):
            args = _check_method(self, function.__self__, function.__name__, args)
        elif isinstance(function, LoopContext):
            args = tuple(_Counted(self, values) for values in args)
        result = super().call(context, function, *args, **kwargs)
        self.made(result)
        return result

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raises an error for attributes that the sandbox hides. Jinja would continue with an empty string."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed in templates")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Allows `str.format` if the widths in it are small."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            for _, _, spec, _ in string.Formatter().parse(value.__self__):
                if spec and ("{" in spec or re.search(r"\d{5}", spec)):
                    raise LimitsExceeded(f"found the format {spec[:20]!r}, expected a width of up to four digits")
        return wrapped


def _attributes(namespace: Namespace) -> object:
    return object.__getattribute__(namespace, "_Namespace__attrs")


class _Counted:
    """The values of a loop. Each costs a step."""

    def __init__(self, environment: GuardedEnvironment, values: Iterable[Any]) -> None:
        self._environment = environment
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._environment.step()
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # Raises TypeError without a length, as Jinja expects.


# --- Guards in the tree -----------------------------------------------------------------------------------------------

# No template can spell these names, since names of filters have no spaces.
_LOOP, _OUTPUT, _JOIN, _MADE = "guard: loop", "guard: output", "guard: join", "guard: made"


class _PlaceGuards(NodeTransformer):
    """Inserts guards into the syntax tree of a template."""

    # Jinja's visitors are named after the nodes.
    # ruff: noqa: N802

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_LOOP, node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through(_OUTPUT, _constant_text(child)) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_JOIN, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if node.find(nodes.NSRef) is not None:
            node.node = _through(_MADE, node.node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._container(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._container(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._container(node, [child for pair in node.items for child in (pair.key, pair.value)])

    def _container(self, node: nodes.Expr, items: Iterable[nodes.Expr]) -> nodes.Node:
        if all(isinstance(item, nodes.Const) for item in items):
            return node  # It is as small as its source.
        self.generic_visit(node)
        return _through(_MADE, node)


def _through(guard: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), guard, [], [], None, None, lineno=node.lineno)


def _constant_text(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


# `pass_context` also keeps Jinja from running these filters while it compiles.


@pass_context
def _guard_loop(context: Context, values: Any) -> _Counted:
    return _Counted(_environment_of(context), values)


@pass_context
def _guard_output(context: Context, value: Any) -> str:
    return _environment_of(context).write(value)


@pass_context
def _guard_join(context: Context, values: list[Any]) -> str:
    environment = _environment_of(context)
    strings = [value if isinstance(value, str) else str(value) for value in values]
    environment.fits(sum(map(len, strings)))
    joined = "".join(strings)
    environment.made(joined)
    return joined


@pass_context
def _guard_made(context: Context, value: Any) -> Any:
    environment = _environment_of(context)
    environment.made([value] if isinstance(value, Namespace) else value)
    return value


def _environment_of(context: Context) -> GuardedEnvironment:
    return cast("GuardedEnvironment", context.environment)


_GUARDS: dict[str, Callable[..., Any]] = {
    _LOOP: _guard_loop,
    _OUTPUT: _guard_output,
    _JOIN: _guard_join,
    _MADE: _guard_made,
}

# --- Filters and methods ----------------------------------------------------------------------------------------------

_FILTER_NAMES = (
    *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list"),
    *("lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
    *("selectattr", "slice", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper", "urlencode"),
    "wordcount",
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
            *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join"),
            *("ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"),
            *("rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase"),
            *("title", "upper", "zfill"),
        )
    ),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
}


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter wrapped in guards.

    Args:
        name: The name of the filter in templates.
        function: The filter.
    """
    wants = str(getattr(function, "jinja_pass_arg", ""))
    check = _FILTER_CHECKS.get(name)

    @pass_context
    def filter_with_guard(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        environment = _environment_of(context)
        environment.step(1 + (len(value) // 128 if isinstance(value, Sized) else 0))
        if isinstance(value, Iterator):  # The check needs its length.
            value = list(islice(value, environment.limits.elements + 1))
            environment.made(value)
        if check is not None:
            check(environment, value, *args, **kwargs)
        first: tuple[Any, ...] = ()
        if "eval_context" in wants:
            first = (context.eval_ctx,)
        elif "environment" in wants:
            first = (environment,)
        elif "context" in wants:
            first = (context,)
        result = function(*first, value, *args, **kwargs)
        environment.made(result)
        return result

    return filter_with_guard


def _check_width(environment: GuardedEnvironment, value: Any, *args: Any, **kwargs: Any) -> None:
    environment.small(*args, *kwargs.values())


def _check_indent(environment: GuardedEnvironment, value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> None:
    environment.small(width)
    environment.fits((str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))


def _check_join(environment: GuardedEnvironment, value: Any, d: Any = "", *args: Any, **kwargs: Any) -> None:
    _, characters = environment.made(value)
    environment.fits(characters + len(value) * len(str(d)))


def _check_sum(environment: GuardedEnvironment, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):  # Adding lists copies them again for each list.
        raise LimitsExceeded("sum: expected numbers")


def _check_replace(environment: GuardedEnvironment, text: Any, old: Any, new: Any, *args: Any, **kwargs: Any) -> None:
    text = str(text)
    environment.fits(len(text) + text.count(str(old)) * len(str(new)))


def _check_percent_format(environment: GuardedEnvironment, value: Any, *args: Any, **kwargs: Any) -> None:
    for field in re.finditer(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?", str(value)):
        if any(number == "*" or len(number or "") > 4 for number in field.groups()):
            raise LimitsExceeded(f"found the format {field[0][:20]!r}, expected a width of up to four digits")


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _check_width,
    "center": _check_width,
    "format": _check_percent_format,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_width,
    "slice": _check_width,
    "sum": _check_sum,
}


def _check_method(environment: GuardedEnvironment, owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Checks a call of a method of a string or number. Methods of Jinja's and the caller's own objects are allowed."""
    allowed = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), None)
    if allowed is None:
        return args
    if name not in allowed:
        raise SecurityError(f"the method {name!r} of {type(owner).__name__} is not allowed in templates")
    if name in ("center", "ljust", "rjust", "zfill"):
        environment.small(*args)
    elif name == "replace" and len(args) >= 2:
        _check_replace(environment, owner, args[0], args[1])
    elif name == "join" and len(args) == 1:
        values = list(islice(args[0], environment.limits.elements + 1))
        _check_join(environment, values, owner)
        args = (values,)
    return args


_FILTERS = {name: guarded(name, FILTERS[name]) for name in _FILTER_NAMES}
