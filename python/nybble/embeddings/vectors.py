"""What `Model.embed`, `Model.classify` and `Model.rerank` compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError
from nybble.generation.request import TextModel, as_prompts, check_length, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

POOLINGS = ("mean", "cls", "last")
"""How hidden states become one vector."""
_PROMPTS = "config_sentence_transformers.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class EmbeddingPrompts:
    """Documents that a model expects before documents or queries."""

    texts: Mapping[str, str]
    """The prompts by name."""
    default: str | None
    """The name of the one that applies where none is chosen."""


def prompts(source: Path) -> EmbeddingPrompts:
    """Reads the prompts of the model in a folder. A file has none.

    Raises:
        ModelError: The file with the prompts is damaged.
    """
    path = source / _PROMPTS
    if not path.is_file():
        return EmbeddingPrompts({}, None)
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ModelError(f"{path}: found more than {_MAX_BYTES} bytes, expected fewer")
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path}: {error}, expected JSON") from None
    known = found.get("prompts") if isinstance(found, dict) else None
    default = found.get("default_prompt_name") if isinstance(found, dict) else None
    named = {} if known is None else known
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ModelError(f'{path}: key "prompts": found {named!r:.60}, expected an object of strings')
    if default is not None and default not in named:
        expected = ", ".join(named) or "null"
        raise ModelError(f'{path}: key "default_prompt_name": found {default!r:.60}, expected {expected}')
    return EmbeddingPrompts(named, default)


def embed(
    model: TextModel, text: Any, pooling: str | None, normalize: bool, prompt: str | None, adapter: str | None = None
) -> npt.NDArray[np.float32]:
    """See `Model.embed`."""
    if pooling is None:
        pooling = model.info.pooling
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: found {pooling!r}, expected mean, cls or last")
    start = _prompt(model, prompt)
    documents, is_one = as_prompts(text, "text")
    documents = [start + each if isinstance(each, str) else each for each in documents]
    return model._native.embed(_encoded(model, documents, is_one), pooling, normalize, adapter)


def _prompt(model: TextModel, name: str | None) -> str:
    known = prompts(model.info.file)
    if name is None:
        return "" if known.default is None else known.texts[known.default]
    if name not in known.texts:
        expected = ", ".join(known.texts) or "None, because the model has no prompts"
        raise ValueError(f"prompt: found {name!r}, expected {expected}")
    return known.texts[name]


def _encoded(model: TextModel, texts: Sequence[Any], is_one: bool) -> list[Sequence[int]]:
    encoded = []
    for number, each in enumerate(texts):
        if isinstance(each, str):
            check_length(model, each)
        name = "text" if is_one else f"text[{number}]"
        encoded.append(prompt_ids(model.tokenizer, each, name, ends=True))
    return encoded


def classify(model: TextModel, text: Any, adapter: str | None = None) -> npt.NDArray[np.float32]:
    """See `Model.classify`."""
    _check_head(model)
    texts, is_one = as_prompts(text, "text")
    scores = model._native.classify([(ids, None) for ids in _encoded(model, texts, is_one)], adapter)
    return scores[0] if is_one else scores


def rerank(
    model: TextModel, query: str, documents: Sequence[str], adapter: str | None = None
) -> npt.NDArray[np.float32]:
    """See `Model.rerank`."""
    _check_head(model)
    if isinstance(documents, (str, bytes)):
        raise TypeError(f"documents: found {type(documents).__name__}, expected a list of str")
    labels = model.info.labels
    if len(labels) != 1 and sorted(label.lower() for label in labels) != ["no", "yes"]:
        found = f"{len(labels)} labels ({', '.join(labels[:4])})"
        raise ModelError(f"{model.info.file.name}: found {found}, expected one score, or yes and no: use classify")
    template = model.tokenizer.chat_templates.get("rerank")
    pairs: list[tuple[Sequence[int], int | None]] = []
    for document in documents:
        if template is None:
            check_length(model, query)
            check_length(model, document)
            pairs.append(model.tokenizer.encode_pair(query, document))
        else:
            # The query first: a document that spells a place of the template stays as it is.
            head, _, tail = template.replace("{query}", query).rpartition("{document}")
            pairs.append((model.tokenizer.encode(head + document + tail), None))
    scores = model._native.classify(pairs, adapter)
    if len(labels) == 1:
        return scores[:, 0]
    yes = [label.lower() for label in labels].index("yes")
    return scores[:, yes] - scores[:, 1 - yes]


def _check_head(model: TextModel) -> None:
    if not model.info.labels:
        name = model.info.file.name
        raise ModelError(f"{name}: {model.info.family} without a classification head, expected a model with labels")
