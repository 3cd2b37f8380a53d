"""Estimates how many states of a regular expression a text can reach at once, which bounds what its parser computes.

It follows partial derivatives (Antimirov, "Partial derivatives of regular expressions and finite automaton
constructions", 1996) along the characters that lead to the most of them.
"""

from __future__ import annotations

import functools
import re
from typing import Any

Node = tuple[Any, ...]
"""An expression: ("char", atom), ("cat", a, b), ("alt", a, b), ("rep", a, least, most) or ("empty",)."""

EMPTY: Node = ("empty",)

_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:P?<[A-Za-z_]\w*>|[a-zA-Z-]*:|[a-zA-Z-]+(?=\))))?")
_CLASS = re.compile(r"\[\^?\]?(?:\[:\^?\w+:\]|[^\]\\]|\\.)*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|[pP]\{[^}]*\}|[pP].|.)", re.DOTALL
)
_SAMPLES = 'a1 _-.AéZ0z\n"/'
_MAX_CHARS = 4
"""Different characters that are tried at each step."""
_STEPS = 250
_SETTLED = 12
"""Steps without more states after which there will be no more."""
_MAX_WORK = 300_000
"""Derivatives that are computed at most."""


def states(expression: str, limit: int) -> int:
    """The largest number of states that a text of a few characters can reach at once, at most about `limit`.

    1 for an expression that cannot be read, which the parser refuses for itself.
    """
    try:
        tree, at = _alternatives(expression, 0)
        if at != len(expression):
            return 1
        return _explore(tree, limit)
    except (ValueError, IndexError, RecursionError, re.error):
        return 1


def _explore(tree: Node, limit: int) -> int:
    chars = [*dict.fromkeys(filter(None, map(_sample, _atoms(tree))))][:_MAX_CHARS]

    @functools.lru_cache(maxsize=100_000)
    def derived(node: Node, char: str) -> frozenset[Node]:
        return _derived(node, char, derived)

    current, largest, settled, work = frozenset([tree]), 1, 0, 0
    for _ in range(_STEPS):
        following: frozenset[Node] = frozenset()
        for char in chars:
            reached: set[Node] = set()
            for node in current:
                reached |= derived(node, char)
                if len(reached) > limit:
                    return len(reached)
            work += len(current)
            if len(reached) > len(following):
                following = frozenset(reached)
        settled = 0 if len(following) > largest else settled + 1
        if not following or settled > _SETTLED or work > _MAX_WORK:
            break
        current, largest = following, max(largest, len(following))
    return largest


def _derived(node: Node, char: str, derived: Any) -> frozenset[Node]:
    """What may follow after a character."""
    match node[0]:
        case "char":
            return frozenset([EMPTY]) if _fits(node[1], char) else frozenset()
        case "alt":
            return frozenset(derived(node[1], char) | derived(node[2], char))
        case "cat":
            found = {_cat(rest, node[2]) for rest in derived(node[1], char)}
            return frozenset(found | derived(node[2], char) if _nullable(node[1]) else found)
        case "rep":
            _, inner, least, most = node
            rest = _rep(inner, max(least - 1, 0), None if most is None else most - 1)
            return frozenset(_cat(each, rest) for each in derived(inner, char))
    return frozenset()


def _cat(a: Node, b: Node) -> Node:
    return b if a == EMPTY else a if b == EMPTY else ("cat", a, b)


def _rep(inner: Node, least: int, most: int | None) -> Node:
    return EMPTY if most == 0 else ("rep", inner, least, most)


def _nullable(node: Node) -> bool:
    match node[0]:
        case "empty":
            return True
        case "alt":
            return _nullable(node[1]) or _nullable(node[2])
        case "cat":
            return _nullable(node[1]) and _nullable(node[2])
        case "rep":
            return node[2] == 0 or _nullable(node[1])
    return False


def _atoms(node: Node) -> list[str]:
    if node[0] == "char":
        return [node[1]]
    return [atom for part in node[1:] if isinstance(part, tuple) for atom in _atoms(part)]


@functools.lru_cache(maxsize=10_000)
def _fits(atom: str, char: str) -> bool:
    return _compiled(atom).fullmatch(char) is not None


@functools.lru_cache(maxsize=1000)
def _compiled(atom: str) -> re.Pattern[str]:
    text = re.sub(r"\\[xu]\{([0-9A-Fa-f]+)\}", lambda found: re.escape(chr(int(found[1], 16))), atom)
    if text.startswith("["):
        # Python warns of characters that may get a meaning in classes, such as a bracket.
        text = "[" + re.sub(r"(?<!\\)(\[|--|&&|~~|\|\|)", lambda found: re.escape(found[0]), text[1:])
    try:
        return re.compile(r"\w" if "[:" in atom else text)
    except (re.error, ValueError, OverflowError):
        return re.compile(r"\w")  # A class that Python does not know, such as \p{L} and [[:alpha:]].


def _sample(atom: str) -> str | None:
    """A character that an atom matches."""
    return next((char for char in [*(c for c in atom if c.isalnum()), *atom, *_SAMPLES] if _fits(atom, char)), None)


# --- Reading an expression: each function returns a tree and the position behind it.


def _alternatives(text: str, at: int) -> tuple[Node, int]:
    tree, at = _sequence(text, at)
    while text[at : at + 1] == "|":
        other, at = _sequence(text, at + 1)
        tree = ("alt", tree, other)
    return tree, at


def _sequence(text: str, at: int) -> tuple[Node, int]:
    parts: list[Node] = []
    while at < len(text) and text[at] not in "|)":
        part, at = _quantified(text, at)
        parts.append(part)
    tree = EMPTY
    for part in reversed(parts):
        tree = _cat(part, tree)
    return tree, at


def _quantified(text: str, at: int) -> tuple[Node, int]:
    tree, at = _atom(text, at)
    while found := _QUANTIFIER.match(text, at):
        at = found.end()
        if found[0][0] == "{":
            least = int(found[1])
            most = least if not found[2] else int(found[3]) if found[3] else None
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
        tree = EMPTY if tree == EMPTY else _rep(tree, least, most)
        at += text[at : at + 1] == "?"
    return tree, at


def _atom(text: str, at: int) -> tuple[Node, int]:
    if found := _GROUP.match(text, at):
        tree, at = _alternatives(text, found.end())
        if text[at : at + 1] != ")":
            raise ValueError
        return tree, at + 1
    if text[at] in "^$":
        return EMPTY, at + 1
    found = _CLASS.match(text, at) or _ESCAPE.match(text, at)
    atom = found[0] if found else "[^\n]" if text[at] == "." else re.escape(text[at])
    at = found.end() if found else at + 1
    return (EMPTY if atom in (r"\b", r"\B", r"\A", r"\z") else ("char", atom)), at
