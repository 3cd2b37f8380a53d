"""Explains what is wrong with a regular expression: syntax that automata cannot hold, too many states, mistakes."""

from __future__ import annotations

import functools
import re

from nybble.constraints.complexity import states

_MAX_STATES = 2000
"""States at once from which on the parser of the grammar may run out of memory in the middle of an answer."""

_UNSUPPORTED = (
    (re.compile(r"\(\?<?[=!]"), "look-ahead and look-behind are not supported"),
    (re.compile(r"\\[1-9]|\\k[<{']|\\g[<{']|\(\?P="), "back-references are not supported"),
    (re.compile(r"\(\?>"), "atomic groups are not supported"),
    (re.compile(r"\(\?\("), "conditional groups are not supported"),
    (re.compile(r"\(\?(?:R|&|P>|\d)"), "recursion is not supported"),
    (re.compile(r"\\[bB<>]"), "word boundaries are not supported"),
    (re.compile(r"\\[ZG]"), "anchors other than ^ and $ are not supported"),
    (re.compile(r"\(\?#"), "comments are not supported"),
    (re.compile(r"\{,\d*\}"), "a repetition needs a minimum: write the count as {0,N}"),
)


@functools.lru_cache(maxsize=64)
def unsupported(expression: str) -> str | None:
    """What an expression uses that is not supported, with its position, or that it is too complex; otherwise None."""
    at, in_class = 0, False
    while at < len(expression):
        char = expression[at]
        if not in_class or char == "\\":
            for pattern, reason in _UNSUPPORTED:
                if (found := pattern.match(expression, at)) and not in_class:
                    return f"{reason} (found {found[0]!r} at character {at + 1})"
        if char == "\\":
            if at + 1 == len(expression):
                return f"a backslash at the end escapes nothing (found it at character {at + 1})"
            at += 2
            continue
        if char == "[" and not in_class:
            in_class = True
            at += 2 if expression[at + 1 : at + 2] == "^" else 1
            at += expression[at : at + 1] == "]"  # The first bracket of a class is a character.
            continue
        if char == "]":
            in_class = False
        at += 1
    if states(expression, _MAX_STATES) > _MAX_STATES:
        return (
            f"a text can be in more than {_MAX_STATES} states of it at once, which is too complex: use smaller counts "
            "for nested repetitions, or separate what they repeat"
        )
    return None


def mistake(expression: str) -> str | None:
    """The mistake that Python's parser finds in an expression; None if it finds none."""
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None
