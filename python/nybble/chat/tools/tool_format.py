"""What a tool-call format consists of."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nybble.chat.tools.reader import Reader, Steps
from nybble.chat.tools.syntaxes.rules import Call, CallRules


class Function(Protocol):
    """A function that the model may call."""

    @property
    def name(self) -> str:
        """The name that the model writes."""

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """The JSON Schema of the arguments; None for any object."""


class Syntax(Protocol):
    """How a call is written between its markers."""

    @property
    def starts(self) -> str:
        """The characters with which a call without an opening marker begins."""

    @property
    def as_list(self) -> bool:
        """Whether several calls share their markers."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Markers within a call, which may be special tokens."""

    def read(self, reader: Reader) -> Steps[None]:
        """Reads what an opening marker begins."""

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers. Numbering begins with `number`."""

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """Grammar rules. The first one, `named`, is what comes between the markers."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model family writes tool calls: after an opening marker, and in some families before a closing one.

    Markers hold the white space that the model writes around them. When calls are read, it is optional.
    """

    name: str
    families: str
    """The families that write it."""
    needles: tuple[str, ...]
    """The chat templates of the format contain all of these strings."""
    syntax: Syntax
    other_needles: tuple[tuple[str, ...], ...] = ()
    """Other sets of strings that chat templates of the format contain."""
    unless: tuple[str, ...] = ()
    """Strings that the chat templates of the format do not contain."""
    opening: str = ""
    closing: tuple[str, ...] = ()
    """The markers after a call. Each may be missing."""
    section: tuple[str, str] = ("", "")
    """The markers around all calls of an answer."""
    separator: str = ""
    """What is between two calls."""
    bare: bool = False
    """An answer may begin with a call without the opening marker."""
    other_openings: tuple[str, ...] = ()
    """Other spellings of the opening marker."""
    text_markers: tuple[str, ...] = ()
    """Markers around the text of an answer, which do not belong to it."""
    text_opening: str = ""
    """The marker that the model writes before text."""
    prompted: str = ""
    """The end of the prompt, if the markers of an answer begin there."""
    tokens: tuple[str, ...] = ()
    """The special tokens in the markers, if the markers themselves are none."""
    ends_turn: bool = False
    """The closing marker ends the answer."""

    def is_in(self, template: str) -> bool:
        """Whether a chat template writes calls in this format."""
        if any(text in template for text in self.unless):
            return False
        return any(all(needle in template for needle in each) for each in (self.needles, *self.other_needles))

    @property
    def openings(self) -> tuple[str, ...]:
        """The spellings of the opening marker."""
        return tuple(filter(None, (self.opening.strip(), *self.other_openings)))

    @property
    def closings(self) -> tuple[str, ...]:
        """The markers after a call."""
        return tuple(marker.strip() for marker in self.closing)

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. In some vocabularies they are special tokens, which decode to no text."""
        own = self.tokens or (*self.openings, *self.closings, *(marker.strip() for marker in self.section))
        return tuple(dict.fromkeys(filter(None, (*own, *self.syntax.tokens))))

    @functools.cached_property
    def scan(self) -> tuple[str, ...]:
        """The markers that may come in the text of an answer, longest first."""
        found = {*self.openings, self.section[0].strip(), *self.text_markers} - {""}
        return tuple(sorted(found, key=len, reverse=True))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Finds the first of these markers."""
        return re.compile("|".join(map(re.escape, self.scan))) if self.scan else None

    def write(self, calls: Sequence[Call]) -> str:
        """Calls as the model writes them."""
        opening, closing = ("", "") if self.bare else (self.opening, "".join(self.closing))
        if self.syntax.as_list:
            written = opening + self.syntax.write(calls) + closing
        else:
            written = self.separator.join(
                opening + self.syntax.write([call], number) + closing for number, call in enumerate(calls)
            )
        return (self.section[0] + written + self.section[1]).removeprefix(self.prompted)
