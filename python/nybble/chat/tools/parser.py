"""Splits an answer into content and tool calls while the model generates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from nybble.chat.tools.reader import CallArguments, CallStart, NotACallError, Reader, Schemas, normalized_json
from nybble.chat.tools.tool_format import ToolFormat
from nybble.chat.tools.unmarked import UnmarkedCalls

Part = str | CallStart | CallArguments
"""A part of an answer: content, the start of a call, or a piece of its arguments."""


class AnswerParser(Protocol):
    """Turns the text of one answer into parts."""

    calls: int
    """Calls found so far."""

    def push(self, text: str, tokens: Sequence[int]) -> Sequence[Part]:
        """The parts that are certain after one more piece of the answer."""

    def finish(self) -> Sequence[Part]:
        """The remaining parts at the end of the answer."""


class PlainText:
    """The parser of answers without tool calls: each piece is content, even an empty one."""

    calls = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[Part]:
        """The text itself."""
        return [text]

    def finish(self) -> list[Part]:
        """Nothing, since no text is held back."""
        return []


class ToolCallParser:
    """Finds tool calls in an answer. Text that turns out not to be a call is content.

    Args:
        tool_format: How calls are written.
        functions: The functions that may be called.
        special_tokens: The markers of the format that are special tokens, which decode to no text, by id.
        stream: Report a call while it is written, before its end is known. Otherwise each call is reported as a whole,
            its arguments in one piece of normalized JSON, and a call without an end is content.
        parallel: Report all calls. Otherwise the parts after the first call are dropped.
        unmarked: Whether an answer that is nothing but a call, written as JSON without markers, is a call. It is held
            back until its end, or until it cannot be one.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        functions: Schemas,
        special_tokens: Mapping[int, str] | None = None,
        *,
        stream: bool = False,
        parallel: bool = True,
        unmarked: bool = False,
    ) -> None:
        self._format = tool_format
        self._functions = functions
        self._special_tokens = special_tokens or {}
        self._stream = stream
        self._parallel = parallel
        self._pending = self._prompted = tool_format.prompted
        """The text that was not read yet. The end of the prompt, which it begins with, never becomes content."""
        # What is being read as calls: all of its text, and the calls in it.
        self._reader: Reader | None = None
        self._read = ""
        self._found: list[CallStart | str] = []
        self._in_section = False
        """Whether another call may follow without text in between."""
        self._section_opening = ""
        """The text of the opening marker of a section in which no call has begun yet."""
        self._awaited: tuple[str, ...] | None = None
        """After a call: the closing markers that may still come."""
        self._has_begun = False
        self._unmarked = (
            UnmarkedCalls(
                functions,
                tool_format.closings[-1] if tool_format.closings else "",
                reads_objects=not (tool_format.bare and "{" in tool_format.syntax.starts),
            )
            if unmarked
            else None
        )
        """Reads the answer from its beginning; None once it is certain that it is more than calls without markers."""
        self.calls: int = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[Part]:
        """The parts that are certain after one more piece, in the order of the text."""
        before = self.calls
        parts: list[Part] = []
        # A piece holds the text of its last token; the tokens before it gave no text or are special tokens.
        added = "".join(self._special_tokens.get(token, "") for token in tokens) + text
        self._pending += added
        if self._unmarked is not None:
            if self._unmarked.push(added):
                return []
            self._unmarked = None
        while self._pending and self._step(parts):
            pass
        return self._allowed(parts, before)

    def finish(self) -> list[Part]:
        """The text that was held back, at the end of the answer."""
        if self._unmarked is not None:
            return self._finish_unmarked(self._unmarked)
        before, parts = self.calls, list[Part]()
        if self._reader is not None:
            if not self._is_reported:
                self._put(parts, self._read)
            self._reader, self._read = None, ""
            return self._allowed(parts, before)
        # An answer may end within the last closing markers.
        ends = (*(self._awaited or ()), *((self._format.section[1].strip(),) if self._in_section else ()))
        if self._awaited is not None or (self._in_section and not self._section_opening):
            rest = self._pending.strip()
            if not rest or any(end.startswith(rest) for end in ends):
                return []
        rest = self._section_opening + self._pending
        for marker in self._format.text_markers:
            rest = rest.replace(marker, "")
        self._put(parts, rest)
        self._pending = self._section_opening = ""
        return self._allowed(parts, before)

    def _finish_unmarked(self, unmarked: UnmarkedCalls) -> list[Part]:
        """The calls without markers that the whole answer consists of; otherwise what its markers say."""
        if not (found := unmarked.finish()):
            self._unmarked = None
            return [*self.push("", ()), *self.finish()]
        self._pending = ""
        self.calls = sum(isinstance(part, CallStart) for part in found)
        return self._allowed([*found], 0)

    def _allowed(self, parts: list[Part], calls: int) -> list[Part]:
        """The parts without those after the first call, unless parallel calls are wanted.

        `calls` is the number of calls before these parts.
        """
        if self._parallel or not self.calls:
            return parts
        kept: list[Part] = []
        for part in parts:
            calls += isinstance(part, CallStart)
            if calls > 1 or (calls == 1 and isinstance(part, str)):
                break
            kept.append(part)
        return kept

    @property
    def _is_reported(self) -> bool:
        """Whether a part of what is being read was reported as a call."""
        return self._stream and bool(self._found)

    def _step(self, parts: list[Part]) -> bool:
        """Reads one call, one marker or one stretch of content. False when more text is needed."""
        if self._reader is not None:
            return self._read_call(self._reader, parts)
        if self._awaited is not None and not self._skip_closing():
            return False
        if self._in_section:
            return self._step_in_section(parts)
        if self._format.bare and not self._has_begun and self._begins_bare(self._pending.lstrip()):
            self._start_reading(parts, "", "")
            return True
        pattern = self._format.pattern
        found = None if pattern is None else pattern.search(self._pending)
        if found is None:
            self._emit(parts, self._certain_length(self._pending))
            return False
        marker = found[0]
        rest = self._pending[found.start() :]
        if any(longer.startswith(rest) and longer != rest for longer in self._format.scan):
            self._emit(parts, self._certain_length(self._pending[: found.start()], is_followed=True))
            return False  # It may be the beginning of a longer marker.
        before = self._pending[: found.start()]
        if marker in self._format.text_markers:
            self._emit(parts, len(before))
            self._pending = self._pending[len(marker) :]
            self._prompted = ""
        elif marker in self._format.openings:
            self._start_reading(parts, before, marker)
        else:
            self._emit(parts, len(before.rstrip()))
            length = self._pending.index(marker) + len(marker)
            self._section_opening, self._pending = self._pending[:length], self._pending[length:]
            self._in_section = True
        return True

    def _step_in_section(self, parts: list[Part]) -> bool:
        """Begins to read the next call of a section, or leaves the section. False when more text is needed."""
        rest = self._pending.lstrip()
        closing = self._format.section[1].strip()
        openings = self._format.openings
        if not rest:
            return False
        opening = next((marker for marker in openings if rest.startswith(marker)), None)
        if opening is None and self._begins_without_opening(rest):
            opening = ""
        if opening is not None:
            space = self._pending[: len(self._pending) - len(rest)]
            self._section_opening, before = "", self._section_opening + space
            self._pending = before + rest
            self._start_reading(parts, before, opening)
            return True
        if not self._section_opening and closing and rest.startswith(closing):
            self._pending, self._in_section, self._awaited = rest[len(closing) :], False, ()
            return True
        if any(marker.startswith(rest) for marker in (closing, *openings) if marker):
            return False
        if self._section_opening:  # No call has come.
            self._put(parts, self._section_opening)
            self._section_opening = ""
        self._in_section = False
        return True

    def _begins_without_opening(self, rest: str) -> bool:
        """Whether a text in a section begins a call that has no opening marker of its own."""
        if self._format.opening and not self._format.bare:
            return False
        return self._begins_bare(rest) if self._format.syntax.starts else not self._ends_section(rest)

    def _ends_section(self, rest: str) -> bool:
        closing = self._format.section[1].strip()
        return bool(closing) and (rest.startswith(closing) or closing.startswith(rest))

    def _begins_bare(self, rest: str) -> bool:
        return rest[:1] != "" and rest[0] in self._format.syntax.starts

    def _start_reading(self, parts: list[Part], before: str, opening: str) -> None:
        """Begins to read calls after an opening marker. White space before the marker belongs to it."""
        content = 0 if self._in_section else len(before.rstrip())
        self._emit(parts, content)
        length = len(before) - content + len(opening)
        self._read, self._pending = self._pending[:length], self._pending[length:]
        self._reader, self._found = Reader(self._format.syntax.read, self._functions), []
        self._awaited = None

    def _read_call(self, reader: Reader, parts: list[Part]) -> bool:
        """Reads calls. False when the text has ended before the calls."""
        ended = failed = False
        length = 0
        for char in self._pending:
            try:
                ended = reader.push(char)
            except NotACallError:
                failed = True
                break
            length += 1
            if ended:
                break
        self._read, self._pending = self._read + self._pending[:length], self._pending[length:]
        found = reader.take()
        self._found += found
        if self._stream:
            parts += [CallArguments(part) if isinstance(part, str) else part for part in found]
            self.calls += sum(isinstance(part, CallStart) for part in found)
        if failed or ended:
            self._stop_reading(parts, failed)
        return failed or ended

    def _stop_reading(self, parts: list[Part], failed: bool) -> None:
        self._reader, self._has_begun = None, True
        if not self._is_reported:
            whole = None if failed else _whole_calls(self._found)
            if whole is None:
                self._put(parts, self._read)
                self._in_section = False
                return
            parts += whole
            self.calls += sum(isinstance(part, CallStart) for part in whole)
        self._prompted = ""
        self._awaited = None if failed else self._format.closings
        self._in_section = not failed and (self._format.bare or self._format.section[0] != "")

    def _skip_closing(self) -> bool:
        """Drops the closing markers after a call, and the white space around them. False while they may still come."""
        rest, awaited = self._pending.lstrip(), self._awaited or ()
        while awaited and rest:
            index = next((index for index, marker in enumerate(awaited) if rest.startswith(marker)), None)
            if index is None:
                break
            rest, awaited = rest[len(awaited[index]) :].lstrip(), awaited[index + 1 :]
        self._pending, self._awaited = rest, awaited
        if not rest or any(marker.startswith(rest) for marker in awaited):
            return False
        self._awaited = None
        return True

    def _certain_length(self, text: str, *, is_followed: bool = False) -> int:
        """The number of characters that cannot belong to a marker or the white space before one.

        `is_followed` says that the beginning of a marker follows the text.
        """
        longest = 0 if is_followed else min(max(map(len, self._format.scan), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(marker.startswith(text[-length:]) for marker in self._format.scan):
                text = text[:-length]
                break
        return len(text.rstrip())

    def _emit(self, parts: list[Part], length: int) -> None:
        """Makes the beginning of the pending text content."""
        if length:
            self._put(parts, self._pending[:length])
            self._pending = self._pending[length:]

    def _put(self, parts: list[Part], text: str) -> None:
        """Adds content, without the end of the prompt."""
        self._has_begun = True
        text, self._prompted = text.removeprefix(self._prompted), ""
        if text:
            parts.append(text)


def _whole_calls(found: Sequence[CallStart | str]) -> list[Part] | None:
    """The calls, each with its arguments in one piece; None if the arguments of one are not JSON."""
    calls: list[tuple[CallStart, list[str]]] = []
    for part in found:
        if isinstance(part, CallStart):
            calls.append((part, []))
        else:
            calls[-1][1].append(part)
    whole: list[Part] = []
    for start, pieces in calls:
        text = "".join(pieces)
        arguments = text if start.quoted else normalized_json(text)
        if arguments is None:
            return None
        whole += [start, CallArguments(arguments)]
    return whole
