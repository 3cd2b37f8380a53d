"""Documents of calibration and evaluation files: prose, JSON, JSON Lines and Parquet, with prose or conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError

if TYPE_CHECKING:
    from nybble.tokenizer.tokenizer import Tokenizer

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
"""Roles of ShareGPT's conversations, by the names there."""
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("question", "answer"),
)
"""Keys of a prompt and its answer."""
_FORMS = 'a string, or an object with "text", "messages", "conversations", or "prompt" and "completion"'


@dataclass(frozen=True)
class Conversation:
    """A conversation, which the model's chat template turns into a text."""

    messages: tuple[Mapping[str, Any], ...]
    where: str
    """Its place, for messages."""

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Returns its token ids. Without a chat template, they are those of its contents, separated by blank lines.

        Raises:
            ModelError: The chat template refuses the conversation.
        """
        if not tokenizer.has_chat_template:
            contents = (_text_of(message.get("content")) for message in self.messages)
            text = "\n\n".join(content for content in contents if content)
            return tokenizer.encode(text, add_special=False, parse_special=False)
        try:
            text = tokenizer.apply_chat_template(self.messages, add_generation_prompt=False)
        except ModelError as error:
            raise ModelError(f"{self.where}: {error}") from None
        return tokenizer.encode(text, add_special=False)


Document = str | Conversation
"""A text, or a conversation."""


def parse(text: str, path: Path) -> list[Document]:
    """Returns the documents of a file with that text.

    JSON Lines of objects and an array of objects are recognized under any name. Anything else is one document.

    Raises:
        ModelError: A record is not a document, or only a part of the file is JSON.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [document(_json(line), _line(path, number), line) for number, line in lines]
    whole = _json(text) if text.lstrip()[:1] in ("{", "[") else None
    if isinstance(whole, list) and (path.suffix.lower() == ".json" or all(isinstance(item, Mapping) for item in whole)):
        return [document(item, f"{path}: item {number}") for number, item in enumerate(whole, 1)]
    if isinstance(whole, Mapping):
        return [document(whole, str(path), text)]
    if lines and isinstance(_json(lines[0][1]), Mapping):
        return [document(_json(line), _line(path, number), line) for number, line in lines]
    if path.suffix.lower() == ".json":
        raise ModelError(f"{path}: found text that is not JSON, expected an array or lines of documents")
    return [text]


def _line(path: Path, number: int) -> str:
    return f"{path}: line {number}"


def parquet(path: Path) -> list[Document]:
    """Returns the documents of a Parquet file, a row each.

    Raises:
        ModelError: pyarrow is not installed, the file is damaged, or a row is not a document.
    """
    try:
        package = import_module("pyarrow.parquet")
    except ImportError:
        raise ModelError(f"{path}: found a Parquet file, which needs pyarrow: pip install pyarrow") from None
    try:
        rows: list[Any] = package.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # Also the exceptions of pyarrow for damaged files.
        raise ModelError(f"{path}: found {error}, expected a Parquet file") from None
    return [document(_without_nulls(row), f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def from_list(items: Iterable[Any]) -> list[Document]:
    """Returns the documents of a list of strings and of records such as `{"messages": [...]}`.

    Raises:
        TypeError: An item is neither.
        ModelError: A record is not a document.
    """
    found: list[Document] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, (str, Mapping)):
            kind = type(item).__name__
            raise TypeError(f"documents: found an item that is a {kind}, expected a path, or a list of str or records")
        found.append(document(item, f"document {number}"))
    return found


def document(record: object, where: str, line: str | None = None) -> Document:
    """Returns the document of a record: a text, or a conversation.

    Raises:
        ModelError: It is neither. The message begins with `where`, and quotes `line`.
    """
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for key in ("messages", "conversations", "conversation", "dialog"):
            if isinstance(turns := record.get(key), (list, tuple)):
                return Conversation(_messages(turns, where), where)
        for key in ("text", "content"):
            if isinstance(text := record.get(key), str):
                return text
        for prompt, answer in _PAIRS:
            if record.get(prompt) is not None and record.get(answer) is not None:
                return _pair(record, prompt, answer, where)
    found = repr((json.dumps(record, default=str) if line is None else line)[:40])
    raise ModelError(f"{where}: found {found}, expected {_FORMS}")


def _pair(record: Mapping[Any, Any], prompt: str, answer: str, where: str) -> Conversation:
    asked, told = record[prompt], record[answer]
    messages = list(asked) if isinstance(asked, (list, tuple)) else [{"role": "user", "content": str(asked)}]
    if isinstance(more := record.get("input"), str) and more.strip() and prompt == "instruction":
        messages = [{"role": "user", "content": f"{asked}\n\n{more}"}]
    if isinstance(system := record.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    messages += list(told) if isinstance(told, (list, tuple)) else [{"role": "assistant", "content": str(told)}]
    return Conversation(_messages(messages, where), where)


def _messages(turns: Sequence[Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """Returns messages in OpenAI's form, also of ShareGPT's."""
    found: list[Mapping[str, Any]] = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and isinstance(sender := turn.get("from"), str) and "value" in turn:
            found.append({"role": _ROLES.get(sender, sender), "content": turn["value"]})
        elif isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
            found.append(turn)
        else:
            raise ModelError(f"{where}: message {number}: found {str(turn)[:40]!r}, expected a role and its content")
    if not found:
        raise ModelError(f"{where}: found no messages, expected at least one")
    return tuple(found)


def _text_of(content: object) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else ()
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _without_nulls(value: Any) -> Any:
    """A row of Parquet without the keys that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(text: str) -> object:
    """The value of a JSON text; None if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
