"""Writes `src/model/hf/transformers.json`: the keys and defaults of transformers' configuration classes.

The models that the file describes are read with these defaults, and a test checks that each key is read, listed as
without influence, or refused. Run it in an environment with transformers, after a new version or for a new family:

    python scripts/transformers_keys.py [model_type ...]

It also writes `tests/data/gguf_keys.json`, the keys of the package `gguf`, if that is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ROOT / "src" / "model" / "hf" / "transformers.json"
GGUF_KEYS = ROOT / "tests" / "data" / "gguf_keys.json"


def plain(value: Any) -> Any:
    """A value as transformers writes it to `config.json`: JSON has no infinite numbers."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def defaults(config: type) -> dict[str, Any]:
    """The fields of a configuration class and their defaults."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = None
    return found


def transformers_keys(model_types: list[str]) -> dict[str, Any]:
    """What the classes of these families define, without what all classes define, which is under `base`."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = defaults(PreTrainedConfig)
    families: dict[str, Any] = {}
    for name in sorted(model_types):
        own = defaults(CONFIG_MAPPING[name])
        families[name] = {key: plain(own[key]) for key in sorted(own) if key not in base}
    return {"version": importlib.metadata.version("transformers"), "base": sorted(base), "families": families}


def gguf_keys() -> dict[str, Any]:
    """The keys that the package `gguf` has for every family, without the family's name."""
    from gguf.constants import Keys

    def strings(group: type) -> Iterator[str]:
        for name, value in vars(group).items():
            if isinstance(value, type):
                yield from strings(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    found = sorted({key.removeprefix("{arch}.") for key in strings(Keys) if key.startswith("{arch}.")})
    return {"version": importlib.metadata.version("gguf"), "keys": found}


def main() -> None:
    """Writes both files, for the families that the first one has or those that are named."""
    known = list(json.loads(CLASSES.read_text(encoding="utf-8"))["families"]) if CLASSES.exists() else []
    CLASSES.write_text(json.dumps(transformers_keys([*known, *sys.argv[1:]]), indent=1) + "\n", encoding="utf-8")
    try:
        keys = gguf_keys()
    except ImportError:
        return
    GGUF_KEYS.write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
