"""Reads tokenizers of Hugging Face folders: `tokenizer.json` and the small files next to it."""

from __future__ import annotations

import errno
import json
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from nybble.errors import ModelError
from nybble.tokenizer.encoders import PackageEncoder, is_failure
from nybble.tokenizer.token_bytes import byte_level_bytes, sentencepiece_bytes
from nybble.tokenizer.vocabulary import MAX_TOKEN_LENGTH, end_tokens

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_GROWTH = 1024
"""Characters that a normalizer may make of one. Common normalizers replace one character by another."""
_MAX_FILE_BYTES = 256 << 20
"""The largest known vocabularies take 35 MB."""


@dataclass(frozen=True)
class Folder:
    """The tokenizer that the files of a folder describe."""

    encoder: PackageEncoder
    token_bytes: Callable[[str], bytes]
    """Returns the bytes of a token by its spelling. Added tokens are written literally instead."""
    adds_space: bool
    prefix_ids: Sequence[int]
    """Ids before every text."""
    suffix_ids: Sequence[int]
    """Ids after every text."""
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    special_texts: dict[str, str]
    """The special tokens that templates know by name, such as bos_token."""
    chat_templates: dict[str, str]


def read(folder: Path) -> Folder:
    """Reads the tokenizer of a folder.

    Raises:
        FileNotFoundError: There is no tokenizer.json.
        ModelError: A file is damaged or needs something that is not supported.
    """
    path = folder / "tokenizer.json"
    text = _text(path)
    if text is None:
        raise FileNotFoundError(errno.ENOENT, "the folder has no tokenizer.json", str(folder))
    return parse(text, str(path), folder)


def parse(text: str, where: str, folder: Path | None = None) -> Folder:
    """Reads the content of a `tokenizer.json`, and the files next to it if there is a folder.

    Args:
        text: The content.
        where: The file, for errors.
        folder: The folder of the other files.

    Raises:
        ModelError: A file is damaged or needs something that is not supported.
    """
    description = _parsed(text, where)
    _check_lengths(description, where)
    package = _package(text, where)
    _check_ids(description, package, where)
    token_bytes, adds_space = _decoding(description.get("decoder"), where)
    config = _json(folder, "tokenizer_config.json")
    special_texts = _special_spellings({**_json(folder, "special_tokens_map.json"), **config})
    model_config = {**_json(folder, "config.json"), **_json(folder, "generation_config.json")}

    def token(name: str) -> int | None:
        content = special_texts.get(f"{name}_token")
        found = None if content is None else package.token_to_id(content)
        return next(_ids(model_config.get(f"{name}_token_id")), None) if found is None else found

    bos_id, eos_id = token("bos"), token("eos")
    before, after = _frame(package, where)
    if isinstance(add := config.get("add_bos_token"), bool) and bos_id is not None:
        before = [bos_id, *(i for i in before if i != bos_id)] if add else [i for i in before if i != bos_id]
    if isinstance(add := config.get("add_eos_token"), bool) and eos_id is not None:
        after = [*(i for i in after if i != eos_id), eos_id] if add else [i for i in after if i != eos_id]
    added = {token.content: i for i, token in package.get_added_tokens_decoder().items()}
    ends = end_tokens(added) | set(_ids(model_config.get("eos_token_id")))
    return Folder(
        encoder=PackageEncoder(package),
        token_bytes=token_bytes,
        adds_space=adds_space,
        prefix_ids=before,
        suffix_ids=after,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=frozenset(ends if eos_id is None else ends | {eos_id}),
        special_texts=special_texts,
        chat_templates=_chat_templates(folder, config),
    )


def _text(path: Path) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe would wait for its writer.
            raise ModelError(f"{path}: not a regular file, expected text")
        if status.st_size > _MAX_FILE_BYTES:
            raise ModelError(f"{path}: found {status.st_size} bytes, expected at most {_MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: found invalid UTF-8 at byte {error.start}, expected text") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # The check is slow and rarely needed.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"{where}: found a lone surrogate, expected whole characters") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: invalid JSON ({error}), expected an object") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    text = None if folder is None else _text(folder / name)
    return {} if text is None or folder is None else _parsed(text, str(folder / name))


def _package(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        package = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if isinstance(error, Exception) or is_failure(error):
            raise ModelError(f"{where}: found an invalid tokenizer ({error})") from error
        raise
    package.no_truncation()  # Files may be saved with settings for batches of equal length.
    package.no_padding()
    if isinstance(package.model, models.BPE):
        package.model.dropout = None  # Dropout skips random merges, which is for training.
    return package


def _check_lengths(description: dict[str, Any], where: str) -> None:
    """Refuses long tokens, which the package would process for minutes, and normalizers that expand text too much."""
    model, added = description.get("model"), description.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = [token.get("content") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if isinstance(vocabulary, dict):
        tokens.extend(vocabulary)
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > MAX_TOKEN_LENGTH:
        raise ModelError(f"{where}: found a token of {longest} characters, expected at most {MAX_TOKEN_LENGTH}")
    growth, waiting = 1, [description.get("normalizer")]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            waiting.extend(step["normalizers"] if isinstance(step.get("normalizers"), list) else ())
            for written in (step.get("prepend"), step.get("content")):
                growth *= max(len(written), 1) if isinstance(written, str) else 1
    if growth > _MAX_GROWTH:
        raise ModelError(
            f"{where}: normalizer: found steps that make {growth} characters of one, expected at most {_MAX_GROWTH}"
        )


def _check_ids(description: dict[str, Any], package: tokenizers.Tokenizer, where: str) -> None:
    """Checks that ids are consecutive and unique.

    The package accepts any ids in the vocabulary, and numbers added tokens itself, without regard to the file.
    """
    vocabulary = description["model"].get("vocab")
    if isinstance(vocabulary, dict):
        size, known = package.get_vocab_size(), dict[int, str]()
        for text, i in vocabulary.items():
            if i >= size:
                raise ModelError(f"{where}: token {text!r:.60}: found the id {i}, expected one below {size}")
            if (other := known.setdefault(i, text)) != text:
                raise ModelError(f"{where}: token {text!r:.60}: found the id {i} of {other!r:.60}, expected its own")
    for token in description.get("added_tokens") or []:
        content, expected = token.get("content"), token.get("id")
        if (found := package.token_to_id(content)) != expected:
            raise ModelError(f"{where}: added token {content!r:.60}: found the id {expected}, expected {found}")


def _decoding(decoder: Any, where: str) -> tuple[Callable[[str], bytes], bool]:
    """The function that returns the bytes of a token, and whether decoding removes a space at the start of a text."""
    steps = list(_steps(decoder))
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return byte_level_bytes, False
    if "Metaspace" in kinds:
        step = steps[kinds.index("Metaspace")]
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return sentencepiece_bytes, scheme != "never"
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in kinds:
        return sentencepiece_bytes, any(step.get("type") == "Strip" and step.get("start") for step in steps)
    raise ModelError(
        f"{where}: decoder: found {', '.join(map(str, kinds)) or 'none'}, expected ByteLevel, Metaspace, or a sequence "
        "of Replace, ByteFallback, Fuse and Strip"
    )


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    if isinstance(decoder, dict):
        if decoder.get("type") == "Sequence":
            for step in decoder.get("decoders") or ():
                yield from (_steps(step) if isinstance(step, dict) and step.get("type") != "Sequence" else ())
        else:
            yield decoder


def _special_spellings(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found


def _ids(value: Any) -> Iterator[int]:
    for i in value if isinstance(value, list) else [value]:
        if type(i) is int and i >= 0:
            yield i


def _frame(package: tokenizers.Tokenizer, where: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text, found by encoding one."""
    try:
        plain = package.encode("a", add_special_tokens=False).ids
        framed = package.encode("a", add_special_tokens=True).ids
    except BaseException as error:
        if is_failure(error):
            raise ModelError(f"{where}: the tokenizer cannot encode the text 'a' ({error})") from error
        raise
    size = package.get_vocab_size()
    if (largest := max(framed, default=0)) >= size:
        raise ModelError(f"{where}: post_processor: found the token {largest}, expected an id below {size}")
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def _chat_templates(folder: Path | None, config: dict[str, Any]) -> dict[str, str]:
    """The templates by name, from all files that may hold them. Template files take precedence."""
    found: dict[str, str] = {}
    for value in (_json(folder, "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(value, str):
            found.setdefault("default", value)
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                found.setdefault(str(entry.get("name")), entry["template"])
    if folder is not None:
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = _text(path) or ""
        if (template := _text(folder / "chat_template.jinja")) is not None:
            found["default"] = template
    return found
