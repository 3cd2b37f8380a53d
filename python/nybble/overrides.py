"""What public classes and methods share: options by name, deprecated spellings, classes that only methods create."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)

P = ParamSpec("P")
R = TypeVar("R")


def doc(text: str, metavar: str | None = None) -> dict[str, str]:
    """Returns the metadata of a field that is an option of the command line: its help and the placeholder of its value.

    The docstring of the field is for Python.
    """
    return {"help": text} if metavar is None else {"help": text, "metavar": metavar}


def merged(options: Options, overrides: Mapping[str, object]) -> Options:
    """Returns `options` with single fields replaced.

    Raises:
        TypeError: An override is not a field. The message lists the fields.
    """
    known = [field.name for field in dataclasses.fields(options)]
    if unknown := [name for name in overrides if name not in known]:
        raise TypeError(f"no such option: {', '.join(unknown)} (options: {', '.join(known)})")
    return dataclasses.replace(options, **overrides) if overrides else options


def chosen(kind: type[Options], options: Options | None, overrides: Mapping[str, object]) -> Options:
    """Returns `options`, or the defaults of `kind`, with single fields replaced.

    Raises:
        TypeError: `options` is of another type, or an override is not a field.
    """
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"options: found {type(options).__name__}, expected {kind.__name__} or single options by name")
    return merged(kind() if options is None else options, overrides)


def check_types(options: DataclassInstance, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Checks the types of fields, each None or one of the types given for it.

    Raises:
        TypeError: A field has another type.
    """
    for name, expected in types.items():
        value = getattr(options, name)
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name}: found {value!r:.80} ({type(value).__name__}), expected {wanted}")


def keyword_only(*names: str, **renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function accept the positions and the names that its parameters had before, with a `DeprecationWarning`.

    Args:
        *names: Keyword-only parameters that were positional, in their order after the positional ones.
        **renamed: The former names of parameters, each with the name of today.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        positional = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        count, name = len(positional), function.__qualname__

        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> R:
            if len(arguments) > count and len(arguments) <= count + len(names):
                for given, value in zip(names, arguments[count:], strict=False):
                    _warn(f"{name}: pass {given} by name")
                    if given in options:
                        raise TypeError(f"{name}: found two values for {given}, expected one")
                    options[given] = value
                arguments = arguments[:count]
            for before, now in renamed.items():
                if before in options:
                    _warn(f"{name}: {before} is now {now}")
                    options[now] = options.pop(before)
            return function(*arguments, **options)

        return wrapper

    return decorate


def _warn(message: str) -> None:
    # Past this function and the wrapper, at the call.
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class Returned:
    """A class whose objects methods return. Calling the class, or pickling an object, says what to call instead."""

    _returned_by: ClassVar[str]
    """The calls that return an object."""
    _instead_of_pickling: ClassVar[str | None] = None
    """What to do in the other process; None if objects can be pickled."""

    if TYPE_CHECKING:

        def __init__(self, _: NoReturn) -> None: ...

    else:

        def __init__(self, *arguments: object, **options: object) -> None:
            found = repr(arguments[0]) if arguments and isinstance(arguments[0], str) else "..."
            calls = self._returned_by.replace("...", found)
            raise TypeError(f"{type(self).__name__} cannot be created directly, expected {calls}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._instead_of_pickling is not None:
            raise cannot_pickle(self, self._instead_of_pickling)
        return super().__reduce_ex__(protocol)


def cannot_pickle(found: object, instead: str) -> TypeError:
    """The error of pickling or copying an object that holds the state of this process."""
    return TypeError(
        f"{type(found).__name__} objects hold state of this process and cannot be pickled or copied: {instead}"
    )
