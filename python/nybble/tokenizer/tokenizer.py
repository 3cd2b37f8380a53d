"""The tokenizer of a model: encodes text, decodes token ids, and applies chat templates."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nybble import _native
from nybble.errors import ModelError
from nybble.overrides import Returned, keyword_only
from nybble.tokenizer.breakers import Breakers
from nybble.tokenizer.detokenizer import StopMatcher, StreamDecoder
from nybble.tokenizer.infill import InfillTokens, find_infill_tokens, infill_prompt

if TYPE_CHECKING:
    from nybble.chat.template import ChatTemplate
    from nybble.tokenizer.encoders import PackageEncoder

T = TypeVar("T")
_Build = Callable[[str], "str | None"]

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer"]


_LONG_TEXT = 100_000
"""Characters whose encoding takes a noticeable time."""
_KEPT_BREAKERS = 16
"""Lists of strings whose token sequences are kept. Finding them takes a look at the whole vocabulary."""


@dataclass(frozen=True)
class _InGguf:
    path: str
    mmap: bool

    def __call__(self, build: _Build) -> _native.TokenizerDescription:
        return _native.TokenizerDescription.from_gguf(self.path, self.mmap, build)

    def metadata_of_file(self) -> Mapping[str, Any]:
        return _native.GgufFile(self.path, self.mmap).metadata


@dataclass(frozen=True)
class _InMetadata:
    metadata: Mapping[str, Any]
    where: str

    def __call__(self, build: _Build) -> _native.TokenizerDescription:
        return _native.TokenizerDescription.from_metadata(self.metadata, self.where, build)

    def metadata_of_file(self) -> Mapping[str, Any]:
        return self.metadata


@dataclass(frozen=True)
class _InFolder:
    folder: str

    def __call__(self, build: _Build) -> _native.TokenizerDescription:
        return _native.TokenizerDescription.from_folder(self.folder, build)

    def metadata_of_file(self) -> Mapping[str, Any]:
        return {}


class Tokenizer(Returned):
    """The vocabulary and chat templates of a model.

    `Tokenizer.load` reads one from a model file, a folder or a repository. Threads may share a tokenizer.
    """

    _returned_by = "Tokenizer.load(...)"
    _where: str
    _describe: _InGguf | _InMetadata | _InFolder
    _description: _native.TokenizerDescription
    _package: PackageEncoder | None
    _special_ids: frozenset[int]
    _eos_ids: frozenset[int]
    _chat_templates: Mapping[str, str]
    _own_template: str | None
    """What replaces the chat templates of the files."""
    _special_texts: Mapping[str, str]
    _compiled: dict[str, ChatTemplate]
    _missing_ids: dict[int, list[tuple[int, int]]]
    _grammar: _native.Vocabulary | None
    _infill: InfillTokens | None
    _breakers: dict[tuple[str, ...], list[list[int]]]
    _breaker_search: Breakers | None

    @classmethod
    def _of(cls, where: str, describe: _InGguf | _InMetadata | _InFolder) -> Tokenizer:
        tokenizer = cls.__new__(cls)
        tokenizer.__setstate__({"_where": where, "_describe": describe})
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # Everything else is read or built again.
        return {"_where": self._where, "_describe": self._describe, "_own_template": self._own_template}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._where, self._describe = state["_where"], state["_describe"]
        self._package = None
        self._description = self._describe(self._build)
        for warning in self._description.warnings:
            warnings.warn(warning, stacklevel=4)
        self._special_ids = frozenset(self._description.special_ids)
        self._eos_ids = frozenset(self._description.end_ids)
        self._chat_templates = self._description.chat_templates
        self._special_texts = self._description.special_spellings
        self._compiled, self._missing_ids, self._grammar, self._infill = {}, {}, None, None
        self._breakers, self._breaker_search = {}, None
        self._own_template = None
        if (template := state.get("_own_template")) is not None:
            self.replace_chat_template(template)

    def _build(self, text: str) -> str | None:
        """Makes the encoder from the content of a `tokenizer.json`. Returns the reason if that is impossible."""
        # Takes 20 ms, in which `Model.load` packs weights in other threads.
        from nybble.tokenizer.encoders import PackageEncoder

        try:
            self._package = PackageEncoder(text)
        except ValueError as error:
            return str(error)
        return None

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
        from nybble.models import hub

        path = hub.resolve(source, filename=filename, revision=revision, only_tokenizer=True)
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(path, mmap=mmap)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> Tokenizer:
        """Loads the tokenizer of a GGUF file. See `load` for errors."""
        return cls._of(os.fspath(path), _InGguf(os.fspath(path), mmap))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], where: str = "GGUF metadata") -> Tokenizer:
        """Builds a tokenizer from the metadata of a GGUF file.

        Args:
            metadata: The keys and values of the file.
            where: The file, for errors.

        Raises:
            ModelError: The metadata is inconsistent, or its kind of tokenizer is not supported.
        """
        return cls._of(where, _InMetadata(dict(metadata), where))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Loads the tokenizer of a folder with a `tokenizer.json`. See `load` for errors."""
        return cls._of(os.fspath(folder), _InFolder(os.fspath(folder)))

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
        ids = self._encoded(text, parse_special)
        return self._description.framed(ids, parse_special, True) if add_special else ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes a text that the model continues: as `encode`, but without end tokens.

        Programs that fine-tune models leave the switch for end tokens on, and after an end token the model begins
        another text.

        Raises:
            TypeError: `text` is not a string.
        """
        return self._description.framed(self._encoded(text, True), True, False)

    def encode_infill(self, prefix: str, suffix: str) -> list[int]:
        """Encodes a prompt whose completion fills the gap between two strings, by the model's own tokens for that.

        Special tokens that are spelled out in the strings are encoded as plain characters.

        Args:
            prefix: The text before the gap.
            suffix: The text after it.

        Raises:
            TypeError: A text is not a string.
            ValueError: The vocabulary has no such tokens: the model cannot fill a gap.
        """
        return infill_prompt(self, self._infill_tokens, prefix, suffix)

    @property
    def infill_ids(self) -> tuple[int, ...]:
        """The tokens around a gap that the model fills. A completion that reaches one of them has ended.

        Raises:
            ValueError: The vocabulary has no such tokens.
        """
        return self._infill_tokens.ids

    @property
    def _infill_tokens(self) -> InfillTokens:
        if self._infill is None:
            self._infill = find_infill_tokens(self.id_of, self._describe.metadata_of_file)
        if self._infill is None:
            raise ValueError(
                "suffix: the model's vocabulary has no tokens for filling in the middle, such as <|fim_prefix|>"
            )
        return self._infill

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int | None]:
        """Encodes two strings as one, such as a query and a document, for models that compare them.

        Special tokens that are spelled out in the strings are encoded as plain characters.

        Returns:
            The token ids, with those that the model expects around and between the strings; and the index of the first
            token of the second text. None instead of the index if the model does not distinguish the strings by type.

        Raises:
            TypeError: A text is not a string.
        """
        return self._description.framed_pair(self._encoded(first, False), self._encoded(second, False))

    def _encoded(self, text: str, parse_special: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"text: found {type(text).__name__}, expected str")
        encoder = self._description if self._package is None else self._package
        return encoder.encode(_without_lone_surrogates(text), parse_special)

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that a long text has at least, without encoding it; 0 where none is known."""
        if len(text) <= _LONG_TEXT or self._package is None:
            return 0
        return self._package.fewest_tokens(text)

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
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Writes a conversation as a prompt, by the model's chat template.

        Args:
            messages: The turns, `[{"role": "user", "content": "Hello"}]`.
            add_generation_prompt: End with the beginning of the model's answer. None does so unless the last message
                is continued.
            continue_final_message: End within the last message, which the model continues: after its content, or after
                the field with this name, such as "reasoning_content".
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
            ValueError: A message has no role or no content, or the last one cannot be continued.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt: found True, expected False with continue_final_message")
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        known = {name: text for name, text in self._special_texts.items() if name not in variables}
        return self._template(template).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            **known,
            **variables,
        )

    def template_variables(self, name: str = "default") -> frozenset[str]:
        """The variables that one of `chat_templates` reads, such as `enable_thinking`; empty without this template.

        Raises:
            ModelError: The template is invalid.
        """
        return self._template(name).variables if name in self._chat_templates else frozenset()

    def replace_chat_template(self, template: str) -> None:
        """Uses a chat template for all conversations instead of those of the model.

        Raises:
            ModelError: The template is invalid.
        """
        before = self._chat_templates, self._compiled
        others = {name: text for name, text in self._chat_templates.items() if name != "tool_use"}
        self._chat_templates, self._compiled = {**others, "default": template}, {}
        try:
            self._template("default")
        except ModelError:
            self._chat_templates, self._compiled = before
            raise
        self._own_template = template

    def _template(self, name: str) -> ChatTemplate:
        if (compiled := self._compiled.get(name)) is None:
            from nybble.chat.template import ChatTemplate  # Jinja is slow to import, and not every run needs it.

            templates = self._chat_templates
            if name not in templates:
                listed = ", ".join(sorted(templates)) or "none"
                raise ModelError(f"{self._where}: found no chat template {name!r} (chat templates: {listed})")
            where = f"{self._where}: chat template {name!r}"
            compiled = self._compiled[name] = ChatTemplate(templates[name], where)
        return compiled

    # --- Single tokens ------------------------------------------------------------------------------------------------

    def token_text(self, token: int) -> str:
        """The spelling of a token in the vocabulary, where U+2581 or U+0120 may stand for a space.

        Raises:
            ValueError: The id is not in the vocabulary.
        """
        return self._of_token(token, self._description.token_text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text. Several tokens may form one character.

        Raises:
            ValueError: The id is not in the vocabulary.
        """
        return self._of_token(token, self._description.token_bytes)

    def _of_token(self, token: int, read: Callable[[int], T | None]) -> T:
        value = read(token) if 0 <= token < self.vocab_size else None
        if value is None:
            raise ValueError(f"token: found {token}, expected an id below {self.vocab_size}")
        return value

    def missing_ids(self, count: int) -> Sequence[tuple[int, int]]:
        """The ids below `count` that have no token, as ranges `(first, end)` in ascending order.

        Many models have more rows in their output matrix than tokens.
        """
        if (found := self._missing_ids.get(count)) is None:
            found = self._missing_ids[count] = self._description.missing_ids(count)
        return found

    def breaker_sequences(self, breakers: tuple[str, ...]) -> list[list[int]]:
        """The token sequences after which a text contains one of some strings, for `dry_sequence_breakers`."""
        if (found := self._breakers.get(breakers)) is None:
            if len(self._breakers) >= _KEPT_BREAKERS:
                self._breakers.clear()
            if self._breaker_search is None:
                self._breaker_search = Breakers(self)
            found = self._breakers[breakers] = self._breaker_search.sequences(breakers)
        return found

    @property
    def _grammar_vocabulary(self) -> _native.Vocabulary:
        """The vocabulary for grammars, built on first use.

        Raises:
            ValueError: The vocabulary has no token that ends a text, which grammars need.
        """
        if self._grammar is None:
            if not self.eos_ids:
                raise ValueError(f"{self._where}: found no token that ends a text, which grammars need")
            self._grammar = self._description.grammar_vocabulary()
        return self._grammar

    def id_of(self, text: str) -> int | None:
        """The id of the token with this spelling; None if there is none."""
        return self._description.id_of(text)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self._description.vocab_size

    @property
    def bos_id(self) -> int | None:
        """The start token, if the model has one."""
        return self._description.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end token, if the model has one."""
        return self._description.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """All tokens that end a generation: at the end of a text, a turn, or a message to a tool."""
        return self._eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """All special tokens, which `decode` leaves out."""
        return self._special_ids

    @property
    def adds_space(self) -> bool:
        """Whether `encode` puts a space before a text, which `decode` removes."""
        return self._description.adds_space

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a default chat template."""
        return "default" in self._chat_templates

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name."""
        return dict(self._chat_templates)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size} tokens ({self._where})>"


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
