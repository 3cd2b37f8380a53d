"""Tests of the language check of `make lint`."""

from __future__ import annotations

import check_language


def found(path: str, text: str) -> list[tuple[int, str]]:
    return [(line, match) for line, match, _ in check_language.faults(path, text)]


def test_phrases_are_found_in_comments_strings_and_function_names() -> None:
    text = 'x = 1\n# the loop goes\n# on\n"to the bit"\n\ndef test_it_goes_on() -> None: ...\n'
    assert found("a.py", text) == [(4, "to the bit"), (2, "goes on"), (6, "goes on")]
    assert found("a.rs", "let c = '\"'; // beside\nlet beside = 1;\n") == [(1, "beside")]
    script = "const beside = 'x'; // beside\n/* b\n beside */ let y = \"so many\";\n"
    assert sorted(found("a.js", script)) == [(1, "beside"), (3, "beside"), (3, "so many")]


def test_code_and_correct_uses_are_not_found() -> None:
    assert not found("a.py", "texts = []\n# `texts`, there is no file, is no longer read\n")
    assert not found("a.md", "`texts` are documents, and there are no others.\n")


def test_old_names_are_found_in_their_own_folders_only() -> None:
    assert found("src/threads/pool.rs", "struct Crew;") == [(1, "Crew")]
    assert not found("src/format/mod.rs", "struct Crew;")
