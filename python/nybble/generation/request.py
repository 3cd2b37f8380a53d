"""Turns a prompt and options into a sequence for a scheduler."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nybble.errors import ContextFullError, ModelError
from nybble.generation.processors import processor
from nybble.generation.reasoning import ReasoningWatch, watch

if TYPE_CHECKING:
    from pathlib import Path

    from nybble import _native
    from nybble.completion import Prompt
    from nybble.model_info import ModelInfo
    from nybble.sampling import SamplingOptions
    from nybble.tokenizer.tokenizer import Tokenizer


class TextModel(Protocol):
    """The interface that generation requires of a model. `nybble.Model` implements it."""

    tokenizer: Tokenizer
    info: ModelInfo
    _source: Path
    _cache_limit: int | None

    @property
    def _native(self) -> _native.Model: ...


@dataclass(frozen=True)
class PreparedRequest:
    """A sequence for a scheduler, and the inputs of its completion."""

    sequence: _native.Sequence
    tokenizer: Tokenizer
    prompt: Sequence[int]
    options: SamplingOptions
    limit: int
    """Largest number of tokens to sample; may be 0."""
    cached_tokens: int
    """Prompt tokens that a session has computed."""
    watch: ReasoningWatch | None = None
    """Follows the reasoning of the completion; None if nothing depends on it."""
    answer_constraint: _native.Constraint | None = None
    """The constraint of the answer, if reasoning comes before it."""


def prepare(model: TextModel, prompt: Prompt, options: SamplingOptions, name: str = "prompt") -> PreparedRequest:
    """Tokenizes a prompt and creates its sequence. An empty prompt becomes the model's start token.

    Raises as `prompt_ids` and `prepare_tokens` do.
    """
    if isinstance(prompt, str):
        check_length(model, prompt)
    return prepare_tokens(model, prompt_ids(model.tokenizer, prompt, name), options)


def check_length(model: TextModel, prompt: str) -> None:
    """Refuses a prompt of megabytes that cannot fit before it is tokenized, which would take seconds.

    Raises:
        ContextFullError: The prompt has more tokens than the context, even if all were the longest one.
    """
    fewest = model.tokenizer.fewest_tokens(prompt)
    if fewest > model.info.context:
        raise ContextFullError(0, fewest, model.info.context)


def check_generates(model: TextModel) -> None:
    """Refuses a model that does not predict the next token.

    Raises:
        ModelError: The model generates no text.
    """
    if not model.info.generates:
        name = model.info.file.name
        raise ModelError(
            f"{name}: {model.info.family} has no output for tokens and generates no text: use embed or classify"
        )


def prepare_tokens(
    model: TextModel,
    ids: Sequence[int],
    options: SamplingOptions,
    session: _native.Session | None = None,
    constraint: _native.Constraint | None = None,
) -> PreparedRequest:
    """Creates a sequence from token ids.

    Args:
        model: The model to compute with.
        ids: The prompt.
        options: How to sample and when to stop. Without a seed, the request gets a random one.
        session: A session that has computed a beginning of the prompt. Its adapter applies.
        constraint: The constraint, if it was already made from the options.

    Raises:
        ContextFullError: The prompt does not fit into the context.
        ModelError: The model generates no text.
        ValueError: The prompt has no tokens or unknown ones, an option is out of range, the constraint is invalid,
            or no adapter has the name in the options.
    """
    native, context = model._native, model.info.context
    check_generates(model)
    if len(ids) > context:
        raise ContextFullError(0, len(ids), context)
    if options.seed is None:
        options = options.replace(seed=int.from_bytes(os.urandom(8), "little"))
    # The last token needs no position of its own: it is sampled but never computed.
    left = context - len(ids) + 1
    constraint = _constraint(model.tokenizer, options) if constraint is None else constraint
    watched = watch(model.tokenizer, ids, options.reasoning_budget)
    waits = watched is not None and watched.is_open
    ends = sorted(model.tokenizer.eos_ids.union(options.stop_token_ids))
    return PreparedRequest(
        sequence=native.sequence(
            ids,
            options,
            None if waits else constraint,
            session,
            # Rows of the output matrix beyond the tokenizer's last token decode to nothing.
            model.tokenizer.missing_ids(model.info.vocabulary),
            ends if options.min_tokens or options.num_beams > 1 else (),
            sorted(model.tokenizer.eos_ids) if options.ignore_eos else (),
            model.tokenizer.breaker_sequences(tuple(options.dry_sequence_breakers)) if options.dry_multiplier else (),
            processor(options),
            options.adapter,
        ),
        tokenizer=model.tokenizer,
        prompt=ids,
        options=options,
        limit=left if options.max_tokens is None else min(left, options.max_tokens),
        # The last token of the prompt is computed in any case: its logits are needed.
        cached_tokens=0 if session is None else min(len(session), len(ids) - 1),
        watch=watched,
        answer_constraint=constraint if waits else None,
    )


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, name: str = "prompt", *, ends: bool = False) -> Sequence[int]:
    """Returns the token ids of a prompt. An empty prompt becomes the model's start token.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text or token ids.
        name: The argument, for errors.
        ends: Whether the tokens of the model that end a text follow. No model continues after them.

    Raises:
        TypeError: `prompt` is neither text nor token ids.
        ValueError: The prompt has no tokens, and the model has no start token.
    """
    encode = tokenizer.encode if ends else tokenizer.encode_prompt
    ids = encode(prompt) if isinstance(prompt, str) else token_ids(prompt, name)
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise ValueError(f"{name}: found no tokens, expected at least one")
    return [tokenizer.bos_id]


def token_ids(ids: object, name: str) -> list[int]:
    """Returns token ids as a list.

    Raises:
        TypeError: `ids` is something else. The message names the argument and the position.
    """
    items = _items(ids, name, "str or a list of token ids")
    for position, item in enumerate(items):
        if not _is_id(item):
            raise TypeError(f"{name}: found {item!r:.40} at position {position}, expected a token id")
    return [int(item) for item in items]


def as_prompts(prompt: object, name: str = "prompt") -> tuple[list[Any], bool]:
    """Returns the prompts of an argument that takes one or several, and whether it is one.

    A string is one prompt, and so is a list that begins with a token id.

    Raises:
        TypeError: The argument is neither a prompt nor a list.
    """
    if isinstance(prompt, str):
        return [prompt], True
    items = _items(prompt, name, "str, a list of token ids, or a list of prompts")
    return ([items], True) if items and _is_id(items[0]) else (items, False)


def _items(found: object, name: str, expected: str) -> list[Any]:
    if isinstance(found, (str, bytes, bytearray, Mapping, Set)) or not isinstance(found, Iterable):
        raise TypeError(f"{name}: found {type(found).__name__}, expected {expected}")
    return list(found)


def _is_id(item: object) -> bool:
    return isinstance(item, (int, numbers.Integral)) and not isinstance(item, bool)


def _constraint(tokenizer: Tokenizer, options: SamplingOptions) -> _native.Constraint | None:
    for kind in ("schema", "regex", "grammar"):
        if (text := getattr(options, kind)) is not None:
            from nybble.constraints.native import constraint

            return constraint(tokenizer._grammar_vocabulary, kind, text)
    return None
