"""Translates grammars from llama.cpp's notation, GBNF, to Lark's syntax."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r\n]|\#[^\n]*)+)
    |(?P<define>[A-Za-z_][\w-]*(?=[ \t]*::=))
    |(?P<name>[A-Za-z_][\w-]*)
    |(?P<is>::=)
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<chars>\[(?:[^\]\\]|\\.)*\])
    |(?P<repeat>\{[ ]*(?:\d+[ ]*)?(?:,[ ]*(?:\d+[ ]*)?)?\}|[*+?])
    |(?P<other>!?<(?:[^<>\s\[\]]+|\[\d+\])>|[().|])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_HEX = {"x": 2, "u": 4, "U": 8}


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written in GBNF rather than in Lark's syntax."""
    return re.search(r"^[ \t]*root[ \t]*::=", text, re.MULTILINE) is not None


def lark_of_gbnf(text: str) -> str:
    """The same grammar in Lark's syntax.

    Raises:
        ValueError: The text is not valid GBNF, or uses single tokens (`<think>`, `!<[42]>`), which have no equivalent
            here. The message names the rule and the line.
    """
    rules: dict[str, list[str]] = {}
    uses: list[tuple[str, str, int]] = []
    rule, depth, before = "", 0, "is"
    for kind, word, line in _tokens(text):
        place = f"rule {rule!r}, line {line}" if rule else f"line {line}"
        if kind == "define":
            if depth:
                raise ValueError(f"{place}: found no end of {depth} group(s), expected ')'")
            if word in rules:
                raise ValueError(f"line {line}: found a second rule {word!r}, expected one definition of each")
            rule, rules[word] = word, []
        elif not rule:
            raise ValueError(f"{place}: found {word!r} before the first rule, expected a name and '::='")
        elif kind == "other" and word[0] in "<!":
            raise ValueError(f"{place}: found {word!r:.40}, a single token, expected characters or rules")
        elif kind == "repeat" and before in ("is", "(", "|", "repeat"):
            raise ValueError(f"{place}: found {word!r} after nothing, expected characters or a rule before it")
        elif kind != "is":
            depth += {"(": 1, ")": -1}.get(word, 0) if kind == "other" else 0
            if depth < 0:
                raise ValueError(f"{place}: found ')' without '('")
            if kind == "name":
                uses.append((word, rule, line))
            try:
                rules[rule].append(_translated(kind, word))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        before = word if kind == "other" else kind
    if depth:
        raise ValueError(f"rule {rule!r}: found no end of {depth} group(s), expected ')'")
    for name, user, line in uses:
        if name not in rules:
            raise ValueError(f"rule {user!r}, line {line}: found {name!r}, which no rule defines")
    return "\n".join(["start: root_", *(f"{_name(name)}: {_alternatives(parts)}" for name, parts in rules.items())])


def _alternatives(parts: list[str]) -> str:
    """The body of a rule. An empty alternative, which GBNF allows, is an empty string in Lark."""
    filled: list[str] = []
    for index, part in enumerate(parts):
        filled.append(part)
        if part in ("|", "(") and (index + 1 == len(parts) or parts[index + 1] in ("|", ")")):
            filled.append('""')
    return " ".join(filled if filled and filled[0] != "|" else ['""', *filled])


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """The parts of a grammar: kind, text and line."""
    at, line = 0, 1
    while at < len(text):
        if (found := _TOKEN.match(text, at)) is None:
            raise ValueError(f"line {line}: found {text[at : at + 20]!r}, expected GBNF")
        if found.lastgroup != "space":
            yield str(found.lastgroup), found[0], line
        line += found[0].count("\n")
        at = found.end()


def _name(word: str) -> str:
    # Names of rules are lower-case in Lark. Two names must not become one.
    return re.sub(r"[A-Z-]", lambda found: "__" if found[0] == "-" else f"_{found[0].lower()}__", word) + "_"


def _translated(kind: str, word: str) -> str:
    match kind:
        case "name":
            return _name(word)
        case "text":
            return json.dumps(_plain(word[1:-1]), ensure_ascii=False)
        case "chars":
            return f"/{_class(word)}/"
        case "repeat":
            return word.replace(" ", "")
    return "/(?s:.)/" if word == "." else word


def _plain(text: str) -> str:
    """A string without its escapes."""

    def char(found: re.Match[str]) -> str:
        if found[1]:
            return chr(int(found[1][1:], 16))
        return _ESCAPES.get(found[2], found[2])

    try:
        return re.sub(r"\\(?:(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})|(.))", char, text, flags=re.DOTALL)
    except (ValueError, OverflowError):
        raise ValueError(f"found an invalid character code in {text[:40]!r}") from None


def _class(word: str) -> str:
    """A class of characters as a regular expression."""
    inner = word[1:-1]
    negated = "^" if inner.startswith("^") else ""
    parts = re.findall(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|[\s\S]", inner[len(negated) :])
    chars = [
        "-" if part == "-" and 0 < index < len(parts) - 1 else _escaped(_plain(part))
        for index, part in enumerate(parts)
    ]
    if not chars:
        raise ValueError(f"found {word!r}, expected characters between the brackets")
    return f"[{negated}{''.join(chars)}]"


def _escaped(char: str) -> str:
    return char if char.isalnum() else f"\\x{{{ord(char):x}}}"
