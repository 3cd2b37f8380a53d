"""Single options by name on top of an options dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)


def doc(text: str) -> dict[str, str]:
    """Returns the metadata of a field with `text` as its help, which the command line shows, too."""
    return {"help": text}


def merged(options: Options, overrides: Mapping[str, object]) -> Options:
    """Returns `options` with single fields replaced.

    Raises:
        TypeError: An override is not a field. The message lists the fields.
    """
    known = [field.name for field in dataclasses.fields(options)]
    if unknown := [name for name in overrides if name not in known]:
        raise TypeError(f"no such option: {', '.join(unknown)} (options: {', '.join(known)})")
    return dataclasses.replace(options, **overrides) if overrides else options
