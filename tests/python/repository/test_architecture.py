"""Rules about imports of the Python package, read off its sources: which part may import which, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "python" / "nybble"

# From the lowest floor up, by the first name below `nybble`. A module imports its own floor and lower ones.
FLOORS = [
    {
        "_native",
        "constraints",
        "engine_options",
        "errors",
        "load_options",
        "memory",
        "overrides",
        "progress",
        "sampling",
    },
    {"chat", "models"},
    {"tokenizer"},
    {"*"},  # Every module that is not listed, the package's own `__init__` included.
    {"server"},
    {"__main__", "cli", "integrations", "ray"},
]

Graph = dict[str, set[str]]


def modules(sources: Mapping[str, str]) -> dict[str, ast.Module]:
    """Syntax trees by module name. `sources` maps paths below the package's parent to contents."""
    return {name_of(Path(path)): ast.parse(text) for path, text in sources.items()}


def name_of(path: Path) -> str:
    """`nybble/server/app.py` is `nybble.server.app`, `nybble/server/__init__.py` is `nybble.server`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, tree: ast.Module, packages: set[str], known: set[str]) -> Iterator[str]:
    """The modules among `known` that a module imports, in functions and under TYPE_CHECKING, too.

    `from package import module` imports the module; `from package import name` imports the package's `__init__`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if name in packages else name.split(".")[:-1]
                above = package[: len(package) - (node.level - 1)]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known:
                    yield target
                elif base in known:
                    yield base


def graph_of(sources: Mapping[str, str]) -> Graph:
    """Module names to the modules that they import."""
    trees = modules(sources)
    packages = {name_of(Path(path)) for path in sources if Path(path).name == "__init__.py"}
    return {name: set(imports(name, tree, packages, set(trees))) - {name} for name, tree in trees.items()}


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import each other, directly or not."""

    def reachable(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += graph[name]
        return reached

    reached = {name: reachable(name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def package_sources() -> dict[str, str]:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]
    return {file.relative_to(PACKAGE.parent).as_posix(): file.read_text(encoding="utf-8") for file in files}


def floor(module: str) -> int:
    first = module.split(".")[1] if "." in module else "*"
    return next((height for height, names in enumerate(FLOORS) if first in names), FLOORS.index({"*"}))


def test_a_floor_imports_only_itself_and_lower_floors() -> None:
    graph = graph_of(package_sources())
    faults = [f"{name} -> {other}" for name in graph for other in graph[name] if floor(other) > floor(name)]
    assert not faults


def test_every_floor_is_in_use() -> None:
    firsts = {name.split(".")[1] for name in graph_of(package_sources()) if "." in name}
    assert set().union(*FLOORS) - {"*"} <= firsts


def test_no_module_imports_itself_through_others() -> None:
    graph = graph_of(package_sources())
    assert "nybble.model" in graph
    found = [
        "\n".join(f"{name} -> {', '.join(sorted(graph[name] & set(circle)))}" for name in circle)
        for circle in circles(graph)
    ]
    assert not found, f"{len(found)} circles of imports:\n" + "\n\n".join(found)


def test_imports_are_found_in_functions_and_relative_to_the_package() -> None:
    sources = {
        "p/__init__.py": "from .a import f",
        "p/a.py": "def f():\n    from p.q import b\n    import p.q.c as c",
        "p/q/__init__.py": "g = 1",
        "p/q/b.py": "from ..a import f\nfrom . import g",
        "p/q/c.py": "import sys\nif TYPE_CHECKING:\n    from .b import x",
    }
    graph = graph_of(sources)
    assert graph == {"p": {"p.a"}, "p.a": {"p.q.b", "p.q.c"}, "p.q": set(), "p.q.b": {"p.a", "p.q"}, "p.q.c": {"p.q.b"}}
    assert circles(graph) == [["p.a", "p.q.b", "p.q.c"]]
