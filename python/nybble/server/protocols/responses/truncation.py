"""`truncation: "auto"`: a conversation that does not fit into the context loses its oldest turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nybble.errors import ContextFullError
from nybble.sampling import SamplingOptions
from nybble.server.generation import GenerationRequest, Prompt

Json = dict[str, Any]
Prepared = Sequence[tuple[Prompt, SamplingOptions]]

_SYSTEM = ("system", "developer")


def turns_of(items: Sequence[Json]) -> tuple[list[Json], list[list[Json]]]:
    """The system messages that begin a conversation, and its turns.

    A turn begins with a message of the user. Calls and their results stay in one turn.
    """
    start = 0
    while start < len(items) and items[start].get("role") in _SYSTEM:
        start += 1
    turns: list[list[Json]] = []
    for item in items[start:]:
        if not turns or (item["type"] == "message" and item.get("role") == "user"):
            turns.append([])
        turns[-1].append(item)
    return [*items[:start]], turns


class Shortened:
    """A request whose prompt loses its oldest turns until it fits.

    Args:
        items: The items of the conversation.
        request_of: The request for some of them.
        context: The number of tokens of the context.
        reserved: The number of tokens to leave for the answer.
    """

    def __init__(
        self,
        items: Sequence[Json],
        request_of: Callable[[Sequence[Json]], GenerationRequest],
        context: int,
        reserved: int,
    ) -> None:
        self._system, self._turns = turns_of(items)
        self._request_of = request_of
        self._most = context - reserved
        self.request: GenerationRequest = request_of(items)
        """The request for the items that are left. Until `prepare` has run, that for all."""

    def prepare(self) -> Prepared:
        """The prompt and options of the longest conversation that fits, or of the last turn.

        Raises:
            ContextFullError: The last turn alone does not fit.
        """
        if (whole := self._fitting(0)) is not None:
            return whole
        # The number of turns to drop is in low + 1..=high.
        low, high = 0, max(len(self._turns) - 1, 0)
        found = None
        while high - low > 1:
            middle = (low + high) // 2
            if (prepared := self._fitting(middle)) is None:
                low = middle
            else:
                high, found = middle, prepared
        if found is None:
            self.request = self._request_of(self._without(high))
            return self.request.prepare()
        return found

    def _without(self, count: int) -> list[Json]:
        return [*self._system, *(item for turn in self._turns[count:] for item in turn)]

    def _fitting(self, count: int) -> Prepared | None:
        """The prompt without the first `count` turns; None if it does not fit."""
        request = self._request_of(self._without(count))
        try:
            prepared = request.prepare()
        except ContextFullError:
            return None
        if any(len(prompt) > self._most for prompt, _ in prepared):
            return None
        self.request = request
        return prepared
