"""Turns a prompt and options into a sequence for a scheduler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nybble.constraints.native import constraint
from nybble.errors import ContextFullError

if TYPE_CHECKING:
    from nybble import _native
    from nybble.model_info import ModelInfo
    from nybble.sampling import SamplingOptions
    from nybble.tokenizer.tokenizer import Tokenizer


class TextModel(Protocol):
    """The interface that generation requires of a model. `nybble.Model` implements it."""

    tokenizer: Tokenizer
    info: ModelInfo

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


def prepare(model: TextModel, prompt: str | Sequence[int], options: SamplingOptions) -> PreparedRequest:
    """Tokenizes a prompt and creates its sequence. An empty prompt becomes the model's start token.

    Raises as `prepare_tokens` does.
    """
    return prepare_tokens(model, prompt_ids(model.tokenizer, prompt), options)


def prepare_tokens(
    model: TextModel, ids: Sequence[int], options: SamplingOptions, session: _native.Session | None = None
) -> PreparedRequest:
    """Creates a sequence from token ids.

    Args:
        model: The model to compute with.
        ids: The prompt.
        options: How to sample and when to stop. Without a seed, the request gets a random one.
        session: A session that has computed a beginning of the prompt.

    Raises:
        ContextFullError: The prompt does not fit into the context.
        ValueError: The prompt has no tokens or unknown ones, an option is out of range, or the constraint is invalid.
    """
    native, context = model._native, model.info.context
    if len(ids) > context:
        raise ContextFullError(0, len(ids), context)
    if options.seed is None:
        options = options.replace(seed=int.from_bytes(os.urandom(8), "little"))
    # The last token needs no position of its own: it is sampled but never computed.
    left = context - len(ids) + 1
    return PreparedRequest(
        sequence=native.sequence(
            ids,
            options,
            _constraint(model.tokenizer, options),
            session,
            # Rows of the output matrix beyond the tokenizer's last token decode to nothing.
            model.tokenizer.missing_ids(model.info.vocabulary),
        ),
        tokenizer=model.tokenizer,
        prompt=ids,
        options=options,
        limit=left if options.max_tokens is None else min(left, options.max_tokens),
        # The last token of the prompt is computed in any case: its logits are needed.
        cached_tokens=0 if session is None else min(len(session), len(ids) - 1),
    )


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Sequence[int]:
    """Returns the token ids of a prompt. An empty prompt becomes the model's start token.

    Raises:
        ValueError: The prompt has no tokens, and the model has no start token.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise ValueError("prompt: found no tokens, expected at least one")
    return [tokenizer.bos_id]


def _constraint(tokenizer: Tokenizer, options: SamplingOptions) -> _native.Constraint | None:
    for kind in ("schema", "regex", "grammar"):
        if (text := getattr(options, kind)) is not None:
            return constraint(tokenizer.grammar_vocabulary, kind, text)
    return None
