"""Calls as the name of a function followed by its arguments as a JSON object: `NAME...{...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.chat.tools.reader import NotACallError, Reader, Steps
from nybble.chat.tools.syntaxes.json_calls import JsonCalls
from nybble.chat.tools.syntaxes.rules import Call, CallRules, json_rule


@dataclass(frozen=True)
class NamedCalls:
    """The name of a function, then its arguments."""

    after: str
    """What the model writes between the name and the arguments."""
    head: str
    """The regular expression of all that may come before the arguments. Its groups are `name`, and perhaps `id`."""
    before: str = ""
    """What may come before the name."""
    numbered: bool = False
    """The name is followed by a colon and the number of the call."""
    or_objects: JsonCalls | None = None
    """Another syntax that earlier versions of the family write."""
    writes_objects: bool = False
    """Grammars write that other syntax."""
    tokens: tuple[str, ...] = ()
    """Markers within a call."""

    starts = ""

    @property
    def as_list(self) -> bool:
        """Whether several calls share their markers."""
        return self.writes_objects

    def read(self, reader: Reader) -> Steps[None]:
        """Reads one call."""
        if self.or_objects is not None:
            first = yield from reader.next_non_space()
            reader.push_back(first)
            if first in self.or_objects.starts:
                yield from self.or_objects.read(reader)
                return
        head = yield from reader.head(self.before)
        if (found := re.fullmatch(self.head, head.strip())) is None:
            raise NotACallError
        reader.begin(found["name"], id=found.groupdict().get("id"))
        yield from reader.value("{", reader.emit)

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers. Numbering begins with `number`."""
        if self.or_objects is not None and self.writes_objects:
            return self.or_objects.write(calls, number)
        return "\n".join(
            f"{self.before}{name}{f':{number + index}' if self.numbered else ''}{self.after}"
            f"{json.dumps(arguments, ensure_ascii=False)}"
            for index, (name, arguments) in enumerate(calls)
        )

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """The rule `named`: one call."""
        if self.or_objects is not None and self.writes_objects:
            return self.or_objects.rules(rules, several=several)
        written = ["named: " + " | ".join(f"f{index}" for index in range(len(rules.functions)))]
        for index, function in enumerate(rules.functions):
            body = json_rule([(function.schema, function.parameter)], lambda found: found[0])
            number = '":" /[0-9]/' if self.numbered else ""
            head = " ".join(filter(None, [rules.text(self.before + function.name), number, rules.text(self.after)]))
            written += [f"f{index}: {head} f{index}_a", f"f{index}_a: {body}"]
        return written
