"""Tests of the crate: the check of its public API, on pieces of rustdoc's pages, and what its package contains."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import public_api

REPOSITORY = Path(__file__).parents[3]

DECLARATION = '<pre class="rust item-decl"><code>{}</code></pre>'
GROWS = '<div class="code-attribute">#[non_exhaustive]</div>'
METHOD = '<h2 id="implementations"><h4 class="code-header">{}</h4><h2 id="blanket-implementations">'


def test_public_fields_and_variants_must_be_able_to_grow() -> None:
    for code in (
        "pub struct Options {\n    pub threads: usize,\n}",
        "pub struct Options<'a> {\n    pub name: &amp;'a str,\n    /* private fields */\n}",
        "pub struct Id(pub u32);",
        "pub enum Choice {\n    One,\n}",
    ):
        assert public_api.shape_faults(DECLARATION.format(code)), code
        assert not public_api.shape_faults(DECLARATION.format(GROWS + code)), code
    assert not public_api.shape_faults(DECLARATION.format("pub struct Model { /* private fields */ }"))


def test_types_of_other_crates_are_found_in_fields_and_methods() -> None:
    field = GROWS + "pub struct Scale {\n    pub value: f16,\n}"
    assert public_api.shape_faults(DECLARATION.format(field)) == ["f16 is not part of the documented API"]
    method = 'pub fn json(&amp;self, text: &amp;<a href="x">Text</a>) -&gt; Value'
    assert public_api.shape_faults(METHOD.format(method)) == ["Value is not part of the documented API"]
    assert not public_api.shape_faults(METHOD.format(method.replace("Value", '<a href="y">Value</a>')))


def test_a_page_becomes_its_signatures() -> None:
    page = DECLARATION.format("pub fn f(\n    x: <a>u32</a>,\n) -&gt; &amp;[<a>u8</a>]")
    assert public_api.signatures(page) == ["pub fn f(", "    x: u32,", ") -> &[u8]"]
    methods = METHOD.format("pub fn f(\n    &amp;self,\n    x: <a>u32</a>,\n) -&gt; <a>u8</a> ⓘ")
    assert public_api.signatures(methods) == ["    pub fn f(&self, x: u32) -> u8"]
    assert public_api.name("model/struct.Model.html") == "nybble::model::Model"


def test_a_change_is_shown_with_what_to_do() -> None:
    lines = public_api.difference("a\nb\n", "a\nc\n")
    assert "-b" in lines
    assert "+c" in lines
    assert "--update" in lines[-1]
    assert not public_api.difference("a\n", "a\n")


def test_the_crate_contains_what_its_sources_include() -> None:
    listed = subprocess.run(
        ["cargo", "package", "--list", "--allow-dirty"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    packaged = set(listed.stdout.split())
    for source in (REPOSITORY / "src").rglob("*.rs"):
        for name in re.findall(r'include_(?:str|bytes)!\("(.+?)"\)', source.read_text(encoding="utf-8")):
            included = (source.parent / name).resolve().relative_to(REPOSITORY)
            assert included.as_posix() in packaged, f"{source}: {included}"
