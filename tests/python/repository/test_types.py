"""What type checkers see: every name has a type, misspelt names are refused, and signatures name what is exported."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import nybble

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "python"
USES, MISUSES = ROOT / "tests/data/typing/uses.py", ROOT / "tests/data/typing/misuses.py"

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="needs pyright: pip install --group lint"
)


def mypy(file: Path, cache: Path) -> set[int]:
    """Returns the lines of a file in which mypy --strict finds an error."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", "--no-error-summary"]
    environment = {**os.environ, "MYPYPATH": str(PACKAGE)}
    done = subprocess.run(
        [*command, "--no-pretty", "--hide-error-context", str(file)],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = re.findall(r"^(.*?):(\d+): error: ", done.stdout, re.MULTILINE)
    assert {Path(name).name for name, _ in found} <= {file.name}, done.stdout
    return {int(line) for _, line in found}


def pyright(*arguments: str | Path) -> dict[str, Any]:
    """Returns what pyright reports as JSON."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def pyright_lines(file: Path, cache: Path) -> set[int]:
    """Returns the lines of a file in which pyright finds an error in its strict mode."""
    project = cache / "pyrightconfig.json"
    shutil.copy(file, cache)  # A project includes files of its own folder only.
    project.write_text(
        json.dumps(
            {
                "include": [file.name],
                "extraPaths": [str(PACKAGE)],
                "typeCheckingMode": "strict",
                # An unknown type follows from an error that is reported, too.
                **{f"reportUnknown{kind}Type": False for kind in ("Member", "Variable", "Argument", "Lambda")},
                "reportUnusedExpression": False,
                "reportUnusedImport": False,
            }
        )
    )
    report = pyright("--project", project)
    assert report["summary"]["filesAnalyzed"] == 1
    found = report["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}


CHECKERS: list[Any] = [mypy, pytest.param(pyright_lines, marks=needs_pyright)]


@pytest.mark.parametrize("check", CHECKERS)
def test_every_form_of_a_call_checks_and_each_misuse_is_refused(
    check: Callable[[Path, Path], set[int]], tmp_path: Path
) -> None:
    assert check(USES, tmp_path) == set()
    # mypy reads what it knows of the package from the cache of the first run.
    lines = MISUSES.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# refused")}
    assert len(expected) > 40
    found = check(MISUSES, tmp_path)
    assert {lines[number - 1] for number in expected - found} == set(), "these were accepted"
    assert {lines[number - 1] for number in found - expected} == set(), "these are correct"


@needs_pyright
def test_every_public_name_has_a_complete_type() -> None:
    report = pyright("--verifytypes", "nybble", "--ignoreexternal")["typeCompleteness"]
    unknown = [symbol["name"] for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert unknown == []
    assert report["completenessScore"] == 1


def test_dir_shows_the_public_names_and_no_more() -> None:
    assert dir(nybble) == sorted(nybble.__all__)
    assert nybble.__all__ == sorted(nybble.__all__)
    assert all(hasattr(nybble, name) for name in nybble.__all__)
    with pytest.raises(AttributeError, match="module 'nybble' has no attribute 'quantise'"):
        nybble.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_nothing_public_belongs_to_the_native_module() -> None:
    for name in nybble.__all__:
        module = getattr(getattr(nybble, name), "__module__", "")
        assert "_native" not in str(module), name


PROTOCOLS = {"Computes", "LoadedModel"}
"""Interfaces that `Model` implements. Programs name `Model`."""


def test_every_name_in_a_public_signature_is_exported() -> None:
    found = {
        f"{where}: {name}"
        for where, name in _names_in_signatures()
        if name not in nybble.__all__ and name not in PROTOCOLS
    }
    assert found == set()


def _names_in_signatures() -> Iterator[tuple[str, str]]:
    """Yields the names of nybble in annotations of public functions, methods and fields, each with its place."""
    for public in nybble.__all__:
        value = getattr(nybble, public)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        # What a class inherits is public, too.
        for part in value.__mro__ if inspect.isclass(value) else [value]:
            if not part.__module__.startswith("nybble.") or part.__module__ == "nybble._native":
                continue
            tree = ast.parse(Path(inspect.getsourcefile(part) or "").read_text(encoding="utf-8"))
            known = _names_of_the_package(tree)
            (node,) = (each for each in tree.body if getattr(each, "name", "") == part.__name__)
            for annotation in _annotations(node):
                for each in ast.walk(annotation):
                    if isinstance(each, ast.Name) and each.id in known:
                        yield public, known[each.id]


def _names_of_the_package(tree: ast.Module) -> Mapping[str, str]:
    """Returns the names that a module defines or imports from nybble, `_native` included."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nybble"):
            names.update({alias.asname or alias.name: alias.name for alias in node.names})
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            is_variable = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "TypeVar"
            if not is_variable:
                names[node.targets[0].id] = node.targets[0].id
    return names


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the annotations of a function, or of the public fields and methods of a class."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        yield from (each.annotation for each in every if each is not None and each.annotation is not None)
        if node.returns is not None:
            yield node.returns
    elif isinstance(node, ast.ClassDef):
        for each in node.body:
            name = getattr(each, "name", "")
            if isinstance(each, ast.AnnAssign) and not getattr(each.target, "id", "_").startswith("_"):
                yield each.annotation
            elif not name.startswith("_") or name in ("__init__", "__iter__", "__aiter__", "__await__", "__enter__"):
                yield from _annotations(each)
