"""Splits an answer into content and tool calls while the model generates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from nybble.server.tools.formats import ToolFormat
from nybble.server.tools.reader import CallArguments, CallStart, NotACallError, Reader, Schemas, normalized_json
from nybble.server.tools.unmarked import UnmarkedCalls

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
        self._pending = ""
        # What is being read as calls: all of its text, and the calls in it.
        self._reader: Reader | None = None
        self._read = ""
        self._found: list[CallStart | str] = []
        self._after_call = False
        self._awaits_closing = False
        self._has_begun = False
        self._unmarked = (
            UnmarkedCalls(functions, tool_format.closing, reads_objects=not tool_format.bare) if unmarked else None
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
        if self._after_call and self._format.closing.startswith(self._pending.strip()):
            return []  # An answer may end within the last closing marker.
        rest = self._pending if self._reader is None or self._is_reported else self._read
        self._pending = self._read = ""
        return self._allowed([rest] if rest else [], self.calls)

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
        """Reads one call or one stretch of content. False when more text is needed."""
        if self._reader is not None:
            return self._read_call(self._reader, parts)
        if self._after_call and not self._skip_closing():
            return False
        if self._format.bare and not self._has_begun and self._pending.lstrip().startswith("{"):
            self._start_reading(parts, "", "")
            return True
        before, opening, _ = self._pending.partition(self._format.opening)
        if opening:
            self._start_reading(parts, before, opening)
            return True
        self._emit(parts, self._certain_length())
        return False

    def _start_reading(self, parts: list[Part], before: str, opening: str) -> None:
        """Begins to read calls after an opening marker. White space before the marker belongs to it."""
        content = len(before.rstrip())
        self._emit(parts, content)
        length = len(before) - content + len(opening)
        self._read, self._pending = self._pending[:length], self._pending[length:]
        self._reader, self._found = Reader(self._format.syntax, self._functions), []
        self._after_call = False

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
                parts.append(self._read)
                return
            parts += whole
            self.calls += sum(isinstance(part, CallStart) for part in whole)
        self._after_call = self._awaits_closing = not failed

    def _skip_closing(self) -> bool:
        """Drops the closing marker after a call, and the white space around it. False while it may still come."""
        rest, closing = self._pending.lstrip(), self._format.closing
        if self._awaits_closing and closing.startswith(rest[: len(closing)]):
            if len(rest) < len(closing):
                self._pending = rest
                return False
            rest, self._awaits_closing = rest[len(closing) :].lstrip(), False
        self._pending, self._after_call = rest, not rest
        return bool(rest)

    def _certain_length(self) -> int:
        """The number of pending characters that cannot belong to an opening marker or the white space before one."""
        text, opening = self._pending, self._format.opening
        for length in range(min(len(opening) - 1, len(text)), 0, -1):
            if opening.startswith(text[-length:]):
                text = text[:-length]
                break
        return len(text.rstrip())

    def _emit(self, parts: list[Part], length: int) -> None:
        if length:
            self._has_begun = True
            parts.append(self._pending[:length])
            self._pending = self._pending[length:]


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
