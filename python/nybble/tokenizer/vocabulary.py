"""The vocabulary of a GGUF file: its `tokenizer.*` keys, checked once, before anything is built from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Any, cast

from nybble.errors import ModelError
from nybble.tokenizer import pretokenizers
from nybble.tokenizer.token_bytes import BYTE_TOKEN

MAX_TOKEN_LENGTH = 1 << 16
"""Characters of a token. Real tokens are far shorter. Long ones would take quadratic time or much memory."""

_BROKEN_BYTE_TOKEN = re.compile(r"<0x(?![0-9A-Fa-f]{2}>).{0,8}>")

# Tokens that end a text or a turn, known by their spelling, since many files do not mark them.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    # A code model starts an unrelated file after these.
    *("<|fim_pad|>", "<fim-pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
)


class TokenKind(IntEnum):
    """The kinds of tokens, as numbered in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_KINDS = (TokenKind.CONTROL, TokenKind.UNKNOWN)
"""The kinds of special tokens, which decode to no text."""


def ids_of_kinds(kinds: Sequence[int], *wanted: TokenKind) -> Iterator[int]:
    """The ids of all tokens of these kinds. `index` searches long vocabularies faster than a loop."""
    for kind in wanted:
        number, i = int(kind), -1
        with suppress(ValueError):
            while True:
                i = kinds.index(number, i + 1)
                yield i


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and the rules that encode text to them."""

    model: str
    """"gpt2": byte-level BPE. "llama": SentencePiece."""
    pre_tokenizer: pretokenizers.PreTokenizer | None
    tokens: Sequence[str]
    ids: Mapping[str, int]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_ids: frozenset[int]
    """Every token that ends a generation."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    drop_space_after: Sequence[int]
    """Special tokens that drop the white space after them."""


class _Keys:
    """Typed access to the metadata. Errors name the file, the key, and what was found and expected."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def fault(self, key: str, found: str, expected: str) -> ModelError:
        return ModelError(f"{self._where}: key {key!r}: found {found}, expected {expected}")

    def string(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, _shown(value), "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, _shown(value), "true or false")
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> Sequence[Any] | None:
        values = self._metadata.get(key)
        if values is None:
            return None
        if not isinstance(values, (list, tuple)):
            raise self.fault(key, _shown(values), f"an array of {kind.__name__}")
        if others := set(map(type, values)) - {kind}:
            raise self.fault(key, f"an array that holds {others.pop().__name__}", f"an array of {kind.__name__}")
        if length is not None and len(values) != length:
            raise self.fault(key, f"{len(values)} elements", f"{length}, one per token")
        return values

    def token_id(self, key: str, tokens: int, default: int | None = None) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return default if default is not None and default < tokens else None
        if type(value) is not int or not 0 <= value < tokens:
            raise self.fault(key, _shown(value), f"a token id below {tokens}")
        return value

    def unused_token_ids(self, tokens: int, used: frozenset[str]) -> None:
        """Checks the ids of special tokens that nybble does not use. Here -1, signed or unsigned, stands for none."""
        for key, value in self._metadata.items():
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and key not in used:
                if type(value) is int and value in (-1, 0xFFFFFFFF):
                    continue
                self.token_id(key, tokens)


def read(metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Vocabulary:
    """Reads the vocabulary of GGUF metadata.

    Args:
        metadata: The keys and values of the file.
        where: The file, for errors.

    Raises:
        ModelError: A key is missing, malformed, contradicts another, or needs an unsupported kind of tokenizer.
    """
    keys = _Keys(metadata, where)
    model = keys.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        found = "nothing" if model is None else repr(model)
        raise keys.fault("tokenizer.ggml.model", found, "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)")
    is_sentencepiece = model == "llama"
    tokens = _tokens(keys)
    kinds = _kinds(keys, tokens, is_sentencepiece)
    ids = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))
    pre_tokenizer = None if is_sentencepiece else _pre_tokenizer(keys, where)

    enders = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    used = frozenset(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", *enders))
    bos, eos, unknown = (1, 2, 0) if is_sentencepiece else (None, None, None)
    bos_id = keys.token_id("tokenizer.ggml.bos_token_id", len(tokens), bos)
    eos_id = keys.token_id("tokenizer.ggml.eos_token_id", len(tokens), eos)
    unknown_id = keys.token_id("tokenizer.ggml.unknown_token_id", len(tokens), unknown)
    other_ends = [keys.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in enders]
    keys.unused_token_ids(len(tokens), used)

    end_ids = end_tokens(ids) | {i for i in (eos_id, *other_ends) if i is not None}
    for i in (
        end_ids
    ):  # They are special tokens even if the file says otherwise: never part of a text, and recognized in prompts.
        if kinds[i] != TokenKind.UNKNOWN:
            kinds[i] = int(TokenKind.CONTROL)
    add_bos = keys.flag(
        "tokenizer.ggml.add_bos_token", is_sentencepiece if pre_tokenizer is None else pre_tokenizer.add_bos
    )
    add_eos = keys.flag("tokenizer.ggml.add_eos_token", False)
    for name, wanted, token in (("bos", add_bos, bos_id), ("eos", add_eos, eos_id)):
        if wanted and token is None and f"tokenizer.ggml.add_{name}_token" in metadata:
            expected = f"a token id, since add_{name}_token is true"
            raise keys.fault(f"tokenizer.ggml.{name}_token_id", "nothing", expected)
    return Vocabulary(
        model=model,
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        ids=ids,
        kinds=kinds,
        scores=_scores(keys, len(tokens)) if is_sentencepiece else (),
        merges=() if is_sentencepiece else _merges(keys),
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        end_ids=frozenset(end_ids),
        add_bos=add_bos and bos_id is not None,
        add_eos=add_eos and eos_id is not None,
        add_space_prefix=is_sentencepiece and keys.flag("tokenizer.ggml.add_space_prefix", True),
        drop_space_after=_drop_space_after(keys, tokens, kinds),
    )


def chat_templates(metadata: Mapping[str, Any], where: str = "GGUF metadata") -> dict[str, str]:
    """The chat templates of a file by name. The one without a name is called default."""
    keys = _Keys(metadata, where)
    prefix = "tokenizer.chat_template"
    found: dict[str, str] = {}
    for key in metadata:
        if (key == prefix or key.startswith(f"{prefix}.")) and (template := keys.string(key)):
            found[key[len(prefix) + 1 :] or "default"] = template
    return found


def end_tokens(ids: Mapping[str, int]) -> set[int]:
    """The tokens of a vocabulary that end a generation, by their spelling."""
    present = {text: ids[text] for text in _END_TEXTS if text in ids}
    # Models with these tokens write <|end|> in the middle of an answer.
    harmony = "<|return|>" in present and "<|call|>" in present
    solar = "<|flush|>" in present and ("<|call|>" in present or "<|calls|>" in present)
    if harmony or solar:
        present.pop("<|end|>", None)
    return set(present.values())


def _tokens(keys: _Keys) -> Sequence[str]:
    key = "tokenizer.ggml.tokens"
    tokens = keys.array(key, str)
    if not tokens:
        raise keys.fault(key, "nothing" if tokens is None else "an empty array", "an array of at least one token")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_LENGTH:
        raise keys.fault(key, f"a token of {longest} characters", f"at most {MAX_TOKEN_LENGTH}")
    return tokens


def _kinds(keys: _Keys, tokens: Sequence[str], is_sentencepiece: bool) -> list[int]:
    key = "tokenizer.ggml.token_type"
    kinds = keys.array(key, int, len(tokens))
    if kinds is None:
        kinds = [6 if is_sentencepiece and BYTE_TOKEN.fullmatch(token) else 1 for token in tokens]
    if min(kinds) < 0 or max(kinds) > TokenKind.BYTE:
        wrong = next(kind for kind in kinds if not 0 <= kind <= TokenKind.BYTE)
        raise keys.fault(key, f"the type {wrong}", f"types of 1 to {int(TokenKind.BYTE)}")
    suspects = [i for i in ids_of_kinds(kinds, TokenKind.BYTE) if not BYTE_TOKEN.fullmatch(tokens[i])]
    if is_sentencepiece:
        suspects += [i for i, token in enumerate(tokens) if token[:3] == "<0x" and _BROKEN_BYTE_TOKEN.fullmatch(token)]
    for i in suspects:
        raise keys.fault("tokenizer.ggml.tokens", f"{tokens[i][:40]!r} as byte token {i}", "'<0x00>' to '<0xFF>'")
    return list(kinds)


def _scores(keys: _Keys, count: int) -> Sequence[float]:
    key = "tokenizer.ggml.scores"
    scores = keys.array(key, float, count)
    if scores is None:
        raise keys.fault(key, "nothing", f"{count} scores, one per token")
    if any(map(math.isnan, scores)):
        raise keys.fault(key, "NaN", "numbers")
    return scores


def _merges(keys: _Keys) -> Sequence[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    merges = keys.array(key, str)
    if merges is None:
        raise keys.fault(key, "nothing", "an array of merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not set(map(len, pairs)) <= {2} or not all(chain.from_iterable(pairs)):
        wrong = next(pair for pair in pairs if len(pair) != 2 or "" in pair)
        raise keys.fault(key, f"{' '.join(wrong)[:40]!r}", "two parts with one space between them")
    return cast("Sequence[tuple[str, str]]", pairs)


def _pre_tokenizer(keys: _Keys, where: str) -> pretokenizers.PreTokenizer:
    name = keys.string("tokenizer.ggml.pre")
    try:
        return pretokenizers.find(name)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def _drop_space_after(keys: _Keys, tokens: Sequence[str], kinds: Sequence[int]) -> Sequence[int]:
    """Phi-3's special tokens, which drop the white space after them. Its files do not mark them as such."""
    name = (keys.string("general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return ()
    kept = ("<unk>", "<s>", "<|endoftext|>")
    return [i for i in ids_of_kinds(kinds, TokenKind.USER_DEFINED, *SPECIAL_KINDS) if tokens[i] not in kept]


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str)) else f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
