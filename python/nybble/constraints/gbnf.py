"""Translates grammars from llama.cpp's notation, GBNF, to Lark's syntax."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NoReturn

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX = {"x": 2, "u": 4, "U": 8}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SINGLE_TOKEN = re.compile(r"!?<[^>\n]*>")
_MAX_REPEATS = 2000
"""The largest number of repetitions, as in llama.cpp."""
_MAX_DEPTH = 100
"""The largest depth of groups."""


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written in GBNF rather than in Lark's syntax."""
    return re.search(r"^[ \t]*root[ \t]*::=", text, re.MULTILINE) is not None


def lark_of_gbnf(text: str) -> str:
    """The same grammar in Lark's syntax.

    Each character becomes a terminal of its own: Lark's longer terminals would be matched greedily, and forbid
    strings that the grammar allows.

    Raises:
        ValueError: The text is not valid GBNF, or uses single tokens (`<think>`, `!<[42]>`), which have no equivalent
            here. The message names the rule and the line.
    """
    parser = _Parser(text)
    rules: dict[str, str] = {}
    parser.skip_space(newlines=True)
    while not parser.is_at_end:
        name = parser.begin_rule()
        if name in rules:
            parser.fail(f"found a second rule {name!r}, expected one definition of each")
        rules[name] = parser.alternatives(depth=0)
        if not parser.is_at_end and parser.char not in "\r\n":
            parser.fail(f"found {parser.rest!r}, expected the end of the line or of the grammar")
        parser.skip_space(newlines=True)
    for name, user, line in parser.uses:
        if name not in rules:
            raise ValueError(f"rule {user!r}, line {line}: found {name!r}, which no rule defines")
    return "\n".join(["start: root_", *(f"{_lark_name(name)}: {body}" for name, body in rules.items())])


@dataclass
class _Parser:
    """Reads a grammar as llama.cpp does, from left to right."""

    text: str
    at: int = 0
    rule: str = ""
    uses: list[tuple[str, str, int]] = field(default_factory=list)
    """Names of rules, the rules that use them, and the lines."""

    @property
    def is_at_end(self) -> bool:
        return self.at >= len(self.text)

    @property
    def char(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.at : self.at + 1]

    @property
    def rest(self) -> str:
        """What comes next, for errors."""
        return self.text[self.at : self.at + 20]

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def fail(self, reason: str) -> NoReturn:
        place = f"rule {self.rule!r}, line {self.line}" if self.rule else f"line {self.line}"
        raise ValueError(f"{place}: {reason}")

    def skip_space(self, *, newlines: bool) -> None:
        """Skips space and comments, and the ends of lines if a rule may continue on the next one."""
        while not self.is_at_end:
            if self.char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.char in " \t" or (newlines and self.char in "\r\n"):
                self.at += 1
            else:
                return

    def name(self) -> str:
        found = _NAME.match(self.text, self.at)
        if found is None:
            self.fail(f"found {self.rest!r}, expected GBNF: the name of a rule")
        self.at = found.end()
        return found[0]

    def begin_rule(self) -> str:
        """Reads `name ::=`."""
        self.rule = ""
        name = self.name()
        self.skip_space(newlines=False)
        if not self.text.startswith("::=", self.at):
            self.fail(f"found {self.rest!r} after {name!r}, expected '::='")
        self.at += 3
        self.rule = name
        self.skip_space(newlines=True)
        return name

    def alternatives(self, depth: int) -> str:
        """The alternatives up to the end of a rule or group, in Lark's syntax."""
        if depth > _MAX_DEPTH:
            self.fail(f"found groups nested more than {_MAX_DEPTH} deep, expected fewer")
        found = [self.sequence(depth)]
        while self.char == "|":
            self.at += 1
            self.skip_space(newlines=True)
            found.append(self.sequence(depth))
        return " | ".join(found)

    def sequence(self, depth: int) -> str:
        """One alternative. An empty one is an empty string in Lark."""
        items: list[str] = []
        while not self.is_at_end:
            if self.char == '"':
                items.append(self.literal())
            elif self.char == "[":
                items.append(self.characters())
            elif self.char == "(":
                items.append(self.group(depth))
            elif self.char == ".":
                self.at += 1
                items.append("/(?s:.)/")
            elif self.char in "*+?{":
                self.repeat(items, depth)
            elif (token := _SINGLE_TOKEN.match(self.text, self.at)) is not None:
                self.fail(f"found {token[0]!r:.40}, a single token, expected characters or rules")
            elif _NAME.match(self.text, self.at) is not None:
                line, name = self.line, self.name()
                self.uses.append((name, self.rule, line))
                items.append(_lark_name(name))
            else:
                break
            self.skip_space(newlines=depth > 0)
        return " ".join(items) if items else '""'

    def group(self, depth: int) -> str:
        self.at += 1
        self.skip_space(newlines=True)
        inner = self.alternatives(depth + 1)
        if self.char != ")":
            self.fail(f"found {self.rest!r}, expected ')'")
        self.at += 1
        return f"({inner})"

    def repeat(self, items: list[str], depth: int) -> None:
        """Applies a repetition to the last item."""
        if not items:
            self.fail(f"found {self.char!r} after nothing, expected characters or a rule before it")
        least, most = 0, None
        if self.char == "{":
            least, most = self.bounds(depth)
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.char]
            self.at += 1
        # Of an item that is repeated already, Lark would read the next repetition as an error.
        item = f"({items[-1]})" if items[-1][-1:] in "*+?}" else items[-1]
        if most == 0:
            items[-1] = '""'
        elif (least, most) in _SIGNS:
            items[-1] = item + _SIGNS[least, most]
        else:
            items[-1] = f"{item}{{{least},{'' if most is None else most}}}"

    def bounds(self, depth: int) -> tuple[int, int | None]:
        """Reads `{2}`, `{2,}` or `{2,5}`."""
        newlines = depth > 0
        self.at += 1
        self.skip_space(newlines=newlines)
        least = self.number()
        most: int | None = least
        self.skip_space(newlines=newlines)
        if self.char == ",":
            self.at += 1
            self.skip_space(newlines=newlines)
            most = self.number() if self.char.isdigit() else None
            self.skip_space(newlines=newlines)
        if self.char != "}":
            self.fail(f"found {self.rest!r}, expected '}}' after the number of repetitions")
        self.at += 1
        if max(least, most or 0) > _MAX_REPEATS:
            self.fail(f"found {max(least, most or 0)} repetitions, expected at most {_MAX_REPEATS}")
        if most is not None and most < least:
            self.fail(f"found {least} to {most} repetitions, expected the smaller number first")
        return least, most

    def number(self) -> int:
        found = re.compile(r"[0-9]{1,9}").match(self.text, self.at)
        if found is None:
            self.fail(f"found {self.rest!r}, expected a number of repetitions")
        self.at = found.end()
        return int(found[0])

    def literal(self) -> str:
        """A string, with a terminal for each character."""
        self.at += 1
        chars: list[str] = []
        while self.char != '"':
            chars.append(json.dumps(self.character(), ensure_ascii=False))
        self.at += 1
        return chars[0] if len(chars) == 1 else f"({' '.join(chars)})" if chars else '""'

    def characters(self) -> str:
        """A class of characters as a regular expression."""
        begin = self.at
        self.at += 1
        negated = "^" if self.char == "^" else ""
        self.at += len(negated)
        parts: list[str] = []
        while self.char != "]":
            first = self.character()
            parts.append(_escaped(first))
            if self.char == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.character()
                if last < first:
                    self.fail(f"found the range {first!r} to {last!r}, expected the smaller character first")
                parts.append(f"-{_escaped(last)}")
        self.at += 1
        if not parts:
            self.fail(f"found {self.text[begin : self.at]!r}, expected characters between the brackets")
        return f"/[{negated}{''.join(parts)}]/"

    def character(self) -> str:
        """A character of a string or class, which may be escaped."""
        if self.is_at_end:
            self.fail("found the end of the grammar within characters, expected their end")
        char = self.char
        self.at += 1
        if char != "\\":
            return self.valid(ord(char), char)
        kind = self.char
        self.at += 1
        if kind in _HEX:
            digits = self.text[self.at : self.at + _HEX[kind]]
            if re.fullmatch(rf"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits) is None:
                self.fail(f"found '\\{kind}{digits[:8]}', expected {_HEX[kind]} hexadecimal digits")
            self.at += len(digits)
            return self.valid(int(digits, 16), f"\\{kind}{digits}")
        if kind not in _ESCAPES or not kind:
            self.fail(f"found the escape '\\{kind}', expected one of x, u, U, t, r, n, \\, \", [, ] and -")
        return _ESCAPES[kind]

    def valid(self, code: int, written: str) -> str:
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            self.fail(f"found {written!a}, an invalid character code")
        return chr(code)


_SIGNS: dict[tuple[int, int | None], str] = {(0, None): "*", (1, None): "+", (0, 1): "?"}


def _lark_name(word: str) -> str:
    # Names of rules are lower-case in Lark and begin with a letter. Two names must not become one.
    name = re.sub(r"[A-Z-]", lambda found: "__" if found[0] == "-" else f"_{found[0].lower()}__", word) + "_"
    return name if name[0].isalpha() else f"r___{name}"


def _escaped(char: str) -> str:
    return char if char.isalnum() and char.isascii() else f"\\x{{{ord(char):x}}}"
