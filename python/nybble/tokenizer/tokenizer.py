"""The tokenizer of a model: encodes text, decodes token ids, and applies chat templates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble import _native
from nybble.errors import ModelError
from nybble.models import hub
from nybble.overrides import Returned, keyword_only
from nybble.tokenizer import encoders, hf_tokenizer, vocabulary
from nybble.tokenizer.detokenizer import StopMatcher, StreamDecoder
from nybble.tokenizer.token_bytes import byte_level_bytes, plain_bytes, sentencepiece_bytes
from nybble.tokenizer.vocabulary import SPECIAL_KINDS, TokenKind, ids_of_kinds

if TYPE_CHECKING:
    from nybble.chat.template import ChatTemplate

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer"]


_LONG_TEXT = 100_000
"""Characters whose encoding takes a noticeable time."""


class Tokenizer(Returned):
    """The vocabulary and chat templates of a model.

    `Tokenizer.load` reads one from a model file, a folder or a repository. Threads may share a tokenizer.
    """

    _returned_by = "Tokenizer.load(...)"
    _parts: _Parts
    _compiled: dict[str, ChatTemplate]
    _missing_ids: dict[int, list[tuple[int, int]]]
    _grammar: _native.Vocabulary | None

    @classmethod
    def _of(cls, parts: _Parts) -> Tokenizer:
        tokenizer = cls.__new__(cls)
        tokenizer.__setstate__({"_parts": parts})
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # Compiled templates and grammars stay in this process: they are built again when they are needed.
        return {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parts = state["_parts"]
        self._compiled, self._missing_ids, self._grammar = {}, {}, None

    # --- Loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        filename: str | None = None,
        revision: str | None = None,
        mmap: bool = True,
    ) -> Tokenizer:
        """Loads the tokenizer of a model.

        Args:
            source: A GGUF file, with or without weights; a folder with a `tokenizer.json` or a GGUF file; a repository
                on the Hugging Face Hub (`org/name`); or None for the default model.
            filename: A name or a pattern (`*Q4_K_M.gguf`) of the GGUF file to take from a folder or repository.
            revision: Branch, tag or commit of a repository.
            mmap: Map a GGUF file into memory while it is read. False reads it without mapping.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: The file cannot be read or downloaded.
            ModelError: The file is damaged or inconsistent, or its kind of tokenizer is not supported.
        """
        if source is not None and filename is None:
            folder = Path(source).expanduser()
            if (folder / "tokenizer.json").is_file():
                return cls.from_folder(folder)
        path = hub.resolve(source, filename=filename, revision=revision, only_tokenizer=True)
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(path, mmap=mmap)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> Tokenizer:
        """Loads the tokenizer of a GGUF file. See `load` for errors."""
        return cls.from_gguf_metadata(_native.GgufFile(path, mmap).metadata, where=os.fspath(path))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Tokenizer:
        """Builds a tokenizer from the metadata of a GGUF file.

        Args:
            metadata: The keys and values of the file.
            where: The file, for errors.

        Raises:
            ModelError: The metadata is inconsistent, or its kind of tokenizer is not supported.
        """
        whole = metadata.get("tokenizer.huggingface.json")
        if isinstance(whole, str) and "tokenizer.ggml.tokens" not in metadata:
            return cls._of(_from_folder(hf_tokenizer.parse(whole, f"{where}: key 'tokenizer.huggingface.json'"), where))
        return cls._of(_from_gguf(metadata, where))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Loads the tokenizer of a folder with a `tokenizer.json`. See `load` for errors."""
        return cls._of(_from_folder(hf_tokenizer.read(Path(folder)), os.fspath(folder)))

    # --- Encoding and decoding ----------------------------------------------------------------------------------------

    @keyword_only("add_special")
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Encodes a text to token ids.

        Args:
            text: Any text. Lone surrogates become U+FFFD.
            add_special: Add the model's start and end tokens if the model was trained with them. A text that already
                begins with the start token receives no second one.
            parse_special: Encode special tokens that are spelled out in the text (`<|im_end|>`) as these tokens, which
                the output of a chat template needs. False encodes them as plain characters, which is safer for
                untrusted text.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: found {type(text).__name__}, expected str")
        parts = self._parts
        ids = parts.encoder.encode(_without_lone_surrogates(text), parse_special)
        if not add_special:
            return ids
        before, after = list(parts.prefix_ids), list(parts.suffix_ids)
        if parse_special and ids:
            if ids[: len(before)] == before:
                before = []
            elif ids[0] == parts.bos_id:
                before = [i for i in before if i != parts.bos_id]
            if ids[-len(after) :] == after:
                after = []
        return [*before, *ids, *after]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a long text has at least, without encoding it; 0 where none is known."""
        encoder = self._parts.encoder
        if len(text) <= _LONG_TEXT or not isinstance(encoder, encoders.PackageEncoder):
            return 0
        return encoder.fewest_tokens(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids to text, without special tokens. Bytes that are not UTF-8 become U+FFFD.

        For ids that continue a text, use `StreamDecoder` with the ids before them.

        Raises:
            TypeError: `ids` are not token ids.
            ValueError: An id is not in the vocabulary.
        """
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TypeError(f"ids: found {type(ids).__name__}, expected token ids")
        decoder = StreamDecoder(self)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    @keyword_only("add_generation_prompt")
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Writes a conversation as a prompt, by the model's chat template.

        Args:
            messages: The turns, `[{"role": "user", "content": "Hello"}]`.
            add_generation_prompt: End with the beginning of the model's answer.
            template: The name of one of `chat_templates`. None is "tool_use" if there are tools and such a template,
                and "default" otherwise.
            tools: Descriptions of functions that the model may call, for templates that support them.
            documents: Documents to answer from, for templates that support them.
            **variables: More variables of the template, such as `enable_thinking=False`.

        Returns:
            The prompt, for `encode`.

        Raises:
            ModelError: There is no such template, it is invalid, it refuses the messages, or it exceeds its limits.
            TypeError: `messages` is not a list of dicts, or a value in a message has the wrong type.
            ValueError: A message has no role or no content.
        """
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        known = {name: text for name, text in self._parts.special_texts.items() if name not in variables}
        return self._template(template).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            **known,
            **variables,
        )

    def _template(self, name: str) -> ChatTemplate:
        if (compiled := self._compiled.get(name)) is None:
            from nybble.chat.template import ChatTemplate  # Jinja is slow to import, and not every run needs it.

            templates = self._parts.chat_templates
            if name not in templates:
                listed = ", ".join(sorted(templates)) or "none"
                raise ModelError(f"{self._parts.where}: found no chat template {name!r} (chat templates: {listed})")
            where = f"{self._parts.where}: chat template {name!r}"
            compiled = self._compiled[name] = ChatTemplate(templates[name], where)
        return compiled

    # --- Single tokens ------------------------------------------------------------------------------------------------

    def token_text(self, token: int) -> str:
        """The spelling of a token in the vocabulary, where U+2581 or U+0120 may stand for a space.

        Raises:
            ValueError: The id is not in the vocabulary.
        """
        text = self._parts.text_of(token) if 0 <= token < self.vocab_size else None
        if text is None:
            raise ValueError(f"token: found {token}, expected an id below {self.vocab_size}")
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text. Several tokens may form one character.

        Raises:
            ValueError: The id is not in the vocabulary.
        """
        text = self.token_text(token)
        return plain_bytes(text) if token in self._parts.plain_ids else self._parts.token_bytes(text)

    def missing_ids(self, count: int) -> Sequence[tuple[int, int]]:
        """The ids below `count` that have no token, as ranges `(first, end)` in ascending order.

        Many models have more rows in their output matrix than tokens.
        """
        if (found := self._missing_ids.get(count)) is None:
            found = []
            for token in range(count):
                if token >= self.vocab_size:
                    found.append((token, count))
                    break
                if self._parts.text_of(token) is None:
                    found.append((token, token + 1))
            self._missing_ids[count] = found
        return found

    @property
    def _grammar_vocabulary(self) -> _native.Vocabulary:
        """The vocabulary for grammars, built on first use.

        Raises:
            ValueError: The vocabulary has no token that ends a text, which grammars need.
        """
        if self._grammar is None:
            if not self.eos_ids:
                raise ValueError(f"{self._parts.where}: found no token that ends a text, which grammars need")
            tokens = [self._grammar_bytes(token) for token in range(self.vocab_size)]
            self._grammar = _native.Vocabulary(tokens, sorted(self.eos_ids))
        return self._grammar

    def _grammar_bytes(self, token: int) -> bytes:
        text = self._parts.text_of(token)
        if text is None:
            return b""
        # The byte 0xFF occurs in no text, so only a grammar that names a special token produces one.
        return b"\xff" + text.encode("utf-8", "replace") if token in self.special_ids else self.token_bytes(token)

    def id_of(self, text: str) -> int | None:
        """The id of the token with this spelling; None if there is none."""
        return self._parts.id_of(text)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self._parts.vocab_size

    @property
    def bos_id(self) -> int | None:
        """The start token, if the model has one."""
        return self._parts.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end token, if the model has one."""
        return self._parts.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """All tokens that end a generation: at the end of a text, a turn, or a message to a tool."""
        return self._parts.end_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """All special tokens, which `decode` leaves out."""
        return self._parts.special_ids

    @property
    def adds_space(self) -> bool:
        """Whether `encode` puts a space before a text, which `decode` removes."""
        return self._parts.adds_space

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a default chat template."""
        return "default" in self._parts.chat_templates

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name."""
        return dict(self._parts.chat_templates)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size} tokens ({self._parts.where})>"


@dataclass(frozen=True)
class _Parts:
    """The parts of a tokenizer, from a GGUF file or a folder."""

    where: str
    encoder: encoders.Encoder
    text_of: Callable[[int], str | None]
    id_of: Callable[[str], int | None]
    token_bytes: Callable[[str], bytes]
    plain_ids: frozenset[int]
    """Tokens that are written literally."""
    adds_space: bool
    vocab_size: int
    prefix_ids: Sequence[int]
    """Ids before every text."""
    suffix_ids: Sequence[int]
    """Ids after every text."""
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    special_ids: frozenset[int]
    special_texts: Mapping[str, str]
    """The special tokens that templates know by name, such as bos_token."""
    chat_templates: Mapping[str, str]


def _from_gguf(metadata: Mapping[str, Any], where: str) -> _Parts:
    known = vocabulary.read(metadata, where)
    tokens, kinds = known.tokens, known.kinds

    special_ids = frozenset(ids_of_kinds(kinds, *SPECIAL_KINDS))
    ids = {"bos_token": known.bos_id, "eos_token": known.eos_id, "unk_token": known.unknown_id}
    return _Parts(
        where=where,
        encoder=encoders.build(known),
        text_of=tokens.__getitem__,
        id_of=known.ids.get,
        token_bytes=sentencepiece_bytes if known.model == "llama" else byte_level_bytes,
        plain_ids=special_ids.union(ids_of_kinds(kinds, TokenKind.USER_DEFINED)),
        adds_space=known.add_space_prefix,
        vocab_size=len(tokens),
        prefix_ids=[known.bos_id] if known.add_bos and known.bos_id is not None else [],
        suffix_ids=[known.eos_id] if known.add_eos and known.eos_id is not None else [],
        bos_id=known.bos_id,
        eos_id=known.eos_id,
        end_ids=known.end_ids,
        special_ids=special_ids,
        special_texts={name: tokens[i] for name, i in ids.items() if i is not None},
        chat_templates=vocabulary.chat_templates(metadata, where),
    )


def _from_folder(folder: hf_tokenizer.Folder, where: str) -> _Parts:
    package = folder.encoder.package
    added = package.get_added_tokens_decoder()
    return _Parts(
        where=where,
        encoder=folder.encoder,
        text_of=package.id_to_token,
        id_of=package.token_to_id,
        token_bytes=folder.token_bytes,
        plain_ids=frozenset(added),
        adds_space=folder.adds_space,
        vocab_size=package.get_vocab_size(with_added_tokens=True),
        prefix_ids=folder.prefix_ids,
        suffix_ids=folder.suffix_ids,
        bos_id=folder.bos_id,
        eos_id=folder.eos_id,
        end_ids=folder.end_ids,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        special_texts=folder.special_texts,
        chat_templates=folder.chat_templates,
    )


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
