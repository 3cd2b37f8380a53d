"""Keeps responses in memory for `previous_response_id`, the latest ones, within a limit."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A response with its conversation."""

    response: Json
    input: Sequence[Json]
    """The items before the answer, those of earlier responses included."""

    @property
    def conversation(self) -> list[Json]:
        """The items before the answer, and the answer."""
        return [*self.input, *self.response["output"]]


@dataclass(frozen=True)
class _Kept:
    """A response and its input as JSON, which takes a fraction of the memory of its values."""

    text: bytes
    items: frozenset[str]
    """The ids of all items."""

    def read(self) -> Stored:
        response, input = json.loads(self.text)
        return Stored(response, input)


class ResponseStore:
    """Responses by id. When they exceed the limit, those that were used longest ago are forgotten.

    Args:
        limit: The largest size of all responses in bytes, as JSON.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stored: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, stored: Stored) -> None:
        """Keeps a response, unless it exceeds the limit alone."""
        text = json.dumps([stored.response, stored.input]).encode()
        if len(text) > self._limit:
            return
        self.remove(stored.response["id"])
        ids = frozenset(item["id"] for item in stored.conversation if "id" in item)
        self._stored[stored.response["id"]] = _Kept(text, ids)
        self._size += len(text)
        while self._size > self._limit:
            _, freed = self._stored.popitem(last=False)
            self._size -= len(freed.text)

    def get(self, id: str) -> Stored | None:
        """A response; None if it is not stored, or no longer."""
        if id not in self._stored:
            return None
        self._stored.move_to_end(id)
        return self._stored[id].read()

    def remove(self, id: str) -> bool:
        """Forgets a response. False if there was none."""
        found = self._stored.pop(id, None)
        self._size -= 0 if found is None else len(found.text)
        return found is not None

    def items(self, ids: Set[str]) -> dict[str, Json]:
        """Those items of all stored conversations that have one of these ids, by id."""
        found: dict[str, Json] = {}
        for kept in reversed(self._stored.values()):
            if missing := (ids & kept.items) - found.keys():
                found |= {item["id"]: item for item in kept.read().conversation if item.get("id") in missing}
        return found
