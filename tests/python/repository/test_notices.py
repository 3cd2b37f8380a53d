"""Tests of THIRD-PARTY-NOTICES and of the script that writes it."""

from __future__ import annotations

import re
from pathlib import Path

import check_wheel
import notices
import pytest


def test_the_notices_list_every_crate_linked_here_with_a_text() -> None:
    text = notices.NOTICES.read_text(encoding="utf-8")
    crates = notices.linked(notices.host())
    assert len(crates) > 10
    assert not {crate.name for crate in crates} & {"nybble-llm", "proptest", "serde_derive"}
    for crate in crates:
        assert re.search(rf"^{re.escape(str(crate))}( \(only .*\))?: ", text, re.MULTILINE), crate
        assert re.search(rf"(^|, ){re.escape(str(crate))}(,|$)", text, re.MULTILINE), f"{crate}: no text applies to it"


def crate(folder: Path, license_name: str, files: dict[str, str]) -> notices.Crate:
    for name, text in files.items():
        folder.joinpath(name).write_text(text, encoding="utf-8")
    return notices.Crate("made-up", "1.0.0", license_name, "https://example.org", folder, ("A. Author",))


def test_one_license_of_several_applies_and_copyright_notices_go_with_it(tmp_path: Path) -> None:
    mit = "Copyright X\n\nPermission is hereby granted, free of\ncharge, to"
    files = {"LICENSE-MIT": mit, "LICENSE-ZLIB": "freely, subject to", "NOTICE": "Made by X", "build.rs": ""}
    both = crate(tmp_path, "Zlib OR MIT", files)
    assert notices.terms_of(both) == [mit, "Made by X"]
    assert notices.terms_of(crate(tmp_path, "MIT/Apache-2.0", files)) == [notices.apache(), "Made by X"]
    texts = notices.terms_of(crate(tmp_path, "MIT AND Zlib", files))
    assert texts == [mit, "freely, subject to", "Made by X"], "the text of each license that applies"


def test_a_crate_without_the_text_of_its_license_gets_it_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"made-up 1\.0\.0: found no text of BSD-3-Clause"):
        notices.terms_of(crate(tmp_path, "BSD-3-Clause", {}))
    (text,) = notices.terms_of(crate(tmp_path, "MIT", {}))
    assert text.startswith("Copyright (c) A. Author\n\nPermission is hereby granted")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("MIT/GPL-3.0", True),
        ("GPL-3.0 OR (MIT AND Zlib)", True),
        ("GPL-3.0", False),
        ("MIT AND GPL-3.0", False),
        ("Apache-2.0 WITH LLVM-exception", False),
    ],
)
def test_an_expression_of_licenses_is_compared_with_those_allowed(expression: str, expected: bool) -> None:
    assert notices.is_allowed(expression, {"MIT", "Zlib", "Apache-2.0"}) is expected


def test_a_wheel_must_name_what_is_linked_and_nothing_else() -> None:
    crates = [str(crate) for crate in notices.linked(notices.host())]
    parts = [dict(zip(("name", "version"), crate.split(), strict=True)) for crate in crates]
    libraries = [str(library) for library in notices.vendored()]
    text = "".join(f"{name}: MIT, https://example.org\n" for name in [*crates, *libraries])
    assert not check_wheel.notice_faults(text, [{"components": parts}])
    assert check_wheel.notice_faults(text + "other 1.0.0: MIT, x\n", [{"components": parts}]) == [
        "THIRD-PARTY-NOTICES: other 1.0.0 is not in the wheel"
    ]
    faults = check_wheel.notice_faults(text.partition("\n")[2], [{"components": parts[1:]}])
    assert faults == [f"THIRD-PARTY-NOTICES: {crates[0]} is missing", f"the bill of materials: {crates[0]} is missing"]
    shorter = text.replace(f"{libraries[0]}: ", "")
    assert check_wheel.notice_faults(shorter, [{"components": parts}]) == [
        f"THIRD-PARTY-NOTICES: {libraries[0]} is missing"
    ]
