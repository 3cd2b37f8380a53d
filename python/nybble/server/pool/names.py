"""The model that a request asks for, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nybble.server.errors import unknown_model
from nybble.server.pool.entry import Entry
from nybble.server.pool.spec import ModelSpec


class Names:
    """The names of all models of a pool: their own, their aliases, and `name:adapter`.

    Args:
        entries: The models, the default first.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._by_name = {name: entry for entry in entries for name in (entry.name, *entry.aliases)}

    def find(self, model: str | None) -> Entry:
        """The model that a request asks for; the first one if it asks for none.

        Raises:
            ApiError: There is no such model.
        """
        return self.resolve(model)[0]

    def resolve(self, model: str | None) -> tuple[Entry, str | None]:
        """The model that a request asks for, and the name of its LoRA adapter; None for the model alone.

        Raises:
            ApiError: There is no such model.
        """
        if model is None:
            return self._entries[0], None
        if (found := self._by_name.get(model)) is not None:
            return found, None
        base, _, lora = model.rpartition(":")
        found = self._by_name.get(base)
        if found is None or not (lora == "latest" or lora in found.lora_names):
            raise unknown_model(model, self.listed())
        return found, lora if lora in found.lora_names else None

    def own_name(self, model: str | None) -> str:
        """The name of the model that answers a request for `model`, which may be an alias.

        Raises:
            ApiError: There is no such model.
        """
        entry, lora = self.resolve(model)
        return entry.name if lora is None else f"{entry.name}:{lora}"

    def listed(self) -> list[str]:
        """The names of all models, each followed by those of its LoRA adapters."""
        return [
            name
            for entry in self._entries
            for name in (entry.name, *(f"{entry.name}:{lora}" for lora in entry.lora_names))
        ]

    def is_taken(self, model: str) -> bool:
        """Whether a model or an alias has this name."""
        return model in self._by_name


def check_names(specs: Iterable[ModelSpec]) -> None:
    """Refuses names that stand for two models.

    Raises:
        ValueError: There are such names.
    """
    owners: dict[str, ModelSpec] = {}
    all_specs = [*specs]
    for spec in all_specs:
        for name in (spec.name, *spec.aliases):
            if not name.strip():
                raise ValueError(f"name: found {name!r} for the model {spec.source!r}, expected at least one character")
            if (other := owners.get(name)) is not None:
                raise ValueError(_clash(name, other, spec))
            owners[name] = spec
    for spec in all_specs:
        for base in (spec.name, *spec.aliases):
            for lora in spec.adapters:
                if (other := owners.get(f"{base}:{lora}")) is not None:
                    raise ValueError(_clash(f"{base}:{lora}", other, spec))


def _clash(name: str, first: ModelSpec, second: ModelSpec) -> str:
    if first is second:
        return f"name: found {name!r} twice for the model {first.source!r}, expected different names"
    return (
        f"name: found {name!r} for both {first.source!r} and {second.source!r}, expected different names; "
        "a file for --config can name them"
    )
