"""Splits the output of a model into reasoning and content while it is generated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nybble.chat.reasoning import (
    CHANNEL,
    END,
    MESSAGE,
    START,
    ReasoningFormat,
    Vocabulary,
    special_markers,
)


class OutputPart(NamedTuple):
    """A part of the output."""

    kind: Literal["reasoning", "content"]
    text: str
    tokens: tuple[int, ...] = ()
    """Special tokens directly before the text, except the markers of reasoning. Tool calls may begin with them."""


@dataclass(frozen=True)
class Specials:
    """The special tokens of a vocabulary, which decode to no text."""

    ids: Collection[int] = frozenset()
    spelled: Mapping[int, str] | None = None
    """Those that markers of reasoning consist of, with their spelling."""

    @classmethod
    def of(cls, tokenizer: Vocabulary, known: ReasoningFormat) -> Specials:
        """The special tokens of a tokenizer."""
        return cls(tokenizer.special_ids, special_markers(tokenizer, known.markers))


def new_splitter(known: ReasoningFormat, prompt: str, specials: Specials) -> Splitter:
    """A splitter of the output that continues a prompt.

    Args:
        known: The format of the reasoning.
        prompt: The prompt, or its end.
        specials: The special tokens.
    """
    if known.channels:
        return _Channels(known, prompt, specials)
    return _Blocks(known, prompt, specials)


_PLACEHOLDERS = 0xDC00
"""The first of the lone surrogates that stand for special tokens. No decoded text contains them."""
_LAST_PLACEHOLDER = 0xDFFF


class Splitter(ABC):
    """Splits text that arrives in pieces. Holds back only what may become a marker, and white space around markers."""

    def __init__(self, specials: Specials) -> None:
        self._specials = specials
        self._tokens: dict[str, int] = {}
        self._pending = ""
        self._parts: list[OutputPart] = []
        self.reasoning_tokens: int = 0
        """Tokens of reasoning so far, end markers included."""

    @property
    @abstractmethod
    def is_reasoning(self) -> bool:
        """Whether the output is within reasoning."""

    @property
    def is_calling(self) -> bool:
        """Whether the output is within a tool call, which an end token ends with the answer."""
        return False

    @property
    @abstractmethod
    def is_undecided(self) -> bool:
        """Whether it is open what the text that is held back belongs to."""

    @property
    @abstractmethod
    def has_answered(self) -> bool:
        """Whether the answer has begun, or comes next because reasoning has ended."""

    def push(self, text: str, tokens: Sequence[int] = ()) -> list[OutputPart]:
        """Takes the next piece of the output and its tokens. Returns the parts that are certain."""
        before = self.is_reasoning
        spelled = self._specials.spelled or {}
        added = [spelled.get(token) or self._placeholder(token) for token in tokens if token in self._specials.ids]
        self._pending += "".join([*added, text])
        while self._pending and self._step():
            pass
        if before:
            self.reasoning_tokens += len(tokens)
        return self._taken()

    def drop_partial_marker(self) -> None:
        """Drops what is held back as the beginning of a marker, before another text follows by force."""
        if self.is_reasoning:
            self._pending = ""

    def finish(self) -> list[OutputPart]:
        """The remaining parts, at the end of the output. A marker that is cut off is not part of them."""
        self._end()
        self._pending = ""
        return self._taken()

    @abstractmethod
    def _step(self) -> bool:
        """Moves text from `_pending` to parts. False when more text is needed."""

    @abstractmethod
    def _end(self) -> None:
        """Moves the text that is held back to parts."""

    def _placeholder(self, token: int) -> str:
        char = chr(_PLACEHOLDERS + token % (_LAST_PLACEHOLDER - _PLACEHOLDERS + 1))
        self._tokens[char] = token
        return char

    def _taken(self) -> list[OutputPart]:
        parts, self._parts = self._parts, []
        return parts

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if kind == "reasoning":
            text = "".join(char for char in text if char not in self._tokens) if self._tokens else text
            if text:
                self._parts.append(OutputPart(kind, text))
            return
        tokens: list[int] = []
        run = ""
        for char in text if self._tokens else ():
            if char not in self._tokens:
                run += char
                continue
            if run:
                self._parts.append(OutputPart(kind, run, tuple(tokens)))
                run, tokens = "", []
            tokens.append(self._tokens[char])
        run = run if self._tokens else text
        if run or tokens:
            self._parts.append(OutputPart(kind, run, tuple(tokens)))


def partial_length(text: str, markers: Collection[str]) -> int:
    """The number of characters at the end of `text` that may begin one of the markers."""
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def _first(text: str, markers: Collection[str]) -> tuple[int, str] | None:
    """The place of the first marker in a text, and the marker."""
    found = [(place, -len(marker), marker) for marker in markers if (place := text.find(marker)) >= 0]
    if not found:
        return None
    place, _, marker = min(found)
    return place, marker


class _Blocks(Splitter):
    """Reasoning between two markers.

    A block stands at the beginning of the output, or anywhere if its marker is a special token. Plain text that only
    mentions the marker stays content.
    """

    def __init__(self, known: ReasoningFormat, prompt: str, specials: Specials) -> None:
        super().__init__(specials)
        self._format = known
        self._state: Literal["start", "reasoning", "content"] = "reasoning" if known.is_open(prompt) else "start"
        self._repeats = self._state == "reasoning"
        """Whether the model may write the start marker again, which the prompt has."""
        self._after_block = prompt.rstrip().endswith(known.end)
        self._strips = True
        """Whether white space before the next character of reasoning is dropped."""
        self._space = ""
        """White space that is reasoning only if more follows."""
        spelled = "".join((specials.spelled or {}).values())
        self._anywhere = bool(spelled) and known.start[: known.start.find(">") + 1 or None] in spelled

    @property
    def is_reasoning(self) -> bool:
        return self._state == "reasoning"

    @property
    def is_undecided(self) -> bool:
        return self._state == "start"

    @property
    def has_answered(self) -> bool:
        return self._state == "content" or (self._state == "start" and self._after_block)

    def _step(self) -> bool:
        step = {"start": self._start, "reasoning": self._reason, "content": self._answer}
        return step[self._state]()

    def _start(self) -> bool:
        text, known = self._pending.lstrip(), self._format
        if text.startswith(known.start):
            self._pending, self._state, self._strips = text[len(known.start) :], "reasoning", True
            return True
        if (lead := next((lead for lead in known.leads if text.startswith(lead)), None)) is not None:
            # White space after it is left out, too.
            self._pending, self._after_block = text[len(lead) :], True
            return True
        if not text or any(marker.startswith(text) for marker in (known.start, *known.leads)):
            return False
        if self._after_block:
            self._pending = text
        self._state = "content"
        return True

    def _reason(self) -> bool:
        known = self._format
        if self._repeats:
            text = self._pending.lstrip()
            if text.startswith(known.start):
                self._pending = text[len(known.start) :]
            elif not text or known.start.startswith(text):
                return False
            self._repeats = False
        markers = (known.end, *known.breaks)
        if (found := _first(self._pending, markers)) is None:
            certain = len(self._pending) - partial_length(self._pending, markers)
            self._thought(self._pending[:certain])
            self._pending = self._pending[certain:]
            return False
        place, marker = found
        self._thought(self._pending[:place])
        self._space = ""
        if marker == known.end:
            self._pending = self._pending[place + len(marker) :]
            self._state, self._after_block = "start", True
        else:
            self._pending, self._state = self._pending[place:], "content"
        return True

    def _thought(self, text: str) -> None:
        text = self._space + text
        if self._strips:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :] if kept or not self._strips else ""
        if kept:
            self._strips = False
            self._emit("reasoning", kept)

    def _answer(self) -> bool:
        markers = [*self._format.trailers, *([self._format.start] if self._anywhere else [])]
        if (found := _first(self._pending, markers)) is None:
            certain = len(self._pending) - partial_length(self._pending, markers)
            self._emit("content", self._pending[:certain])
            self._pending = self._pending[certain:]
            return False
        place, marker = found
        self._emit("content", self._pending[:place])
        self._pending = self._pending[place + len(marker) :]
        if marker == self._format.start:
            self._state, self._strips = "reasoning", True
        return True

    def _end(self) -> None:
        pending, known = self._pending, self._format
        if self._state == "reasoning":
            if self._repeats and known.start.startswith(pending.lstrip()):
                return
            cut = partial_length(pending, (known.end, *known.breaks))
            self._thought(pending[: len(pending) - cut])
            return
        if self._state == "start":
            text = pending.lstrip()
            if len(text) > 1 and any(marker.startswith(text) for marker in (known.start, *known.leads)):
                return
            self._emit("content", text if self._after_block else pending)
            return
        cut = partial_length(pending, known.trailers)
        self._emit("content", pending[: len(pending) - cut] if cut > 1 else pending)


_HEADS = (CHANNEL, MESSAGE, START, END, " to=", "to=", "<|constrain|>", "assistant")
"""What the output may begin with where a header is expected."""


class _Channels(Splitter):
    """Messages with channels, as gpt-oss writes them (Harmony).

    The channel `analysis` is reasoning. `final`, and `commentary` to nobody, are content. A message to a recipient is a
    tool call, and becomes content with its header and its markers.
    """

    def __init__(self, known: ReasoningFormat, prompt: str, specials: Specials) -> None:
        super().__init__(specials)
        self._state: Literal["header", "reasoning", "content", "call"] = "header"
        self._header = ""
        self._is_final = False
        _, opening, last = prompt.rpartition(START)
        if opening and MESSAGE in last:
            self._begin(last.removeprefix("assistant").partition(MESSAGE)[0], silent=True)

    @property
    def is_reasoning(self) -> bool:
        return self._state == "reasoning"

    @property
    def is_calling(self) -> bool:
        return self._state == "call"

    @property
    def is_undecided(self) -> bool:
        return self._state == "header"

    @property
    def has_answered(self) -> bool:
        return self._is_final

    def _step(self) -> bool:
        if self._state == "header":
            return self._read_header()
        ends = (END, START, "<|call|>", "<|return|>")
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "reasoning" else "content"
        if (found := _first(self._pending, ends)) is None:
            certain = len(self._pending) - partial_length(self._pending, ends)
            self._emit(kind, self._pending[:certain])
            self._pending = self._pending[certain:]
            return False
        place, marker = found
        self._emit(kind, self._pending[:place] + (marker if self._state == "call" and marker != START else ""))
        self._pending = self._pending[place + (0 if marker == START else len(marker)) :]
        self._state, self._header = "header", ""
        return True

    def _read_header(self) -> bool:
        text = self._pending
        if not self._header and not any(text.startswith(head) or head.startswith(text) for head in _HEADS):
            self._state, self._is_final = "content", True  # No header: the model has left the format.
            return True
        if (found := _first(text, (MESSAGE, END))) is None:
            return False
        place, marker = found
        if marker == END:  # A header without a message.
            self._pending = text[place + len(END) :]
            return True
        self._pending = text[place + len(MESSAGE) :]
        self._begin(text[:place].rpartition(START)[2].removeprefix("assistant"))
        return True

    def _begin(self, header: str, *, silent: bool = False) -> None:
        """Begins the message of a header."""
        channel = header.partition(CHANNEL)[2].strip()
        self._header = header
        if "to=" in header:
            self._state = "call"
            if not silent:
                self._emit("content", f"{START}assistant{header}{MESSAGE}")
        elif channel.startswith("analysis"):
            self._state = "reasoning"
        else:
            self._state = "content"
            self._is_final = self._is_final or not channel.startswith("commentary")

    def _end(self) -> None:
        if self._state == "header":
            return
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "reasoning" else "content"
        cut = partial_length(self._pending, (END, START, "<|call|>", "<|return|>"))
        # One character alone may be the end of an answer.
        self._emit(kind, self._pending[: len(self._pending) - cut] if cut > 1 or self.is_reasoning else self._pending)
