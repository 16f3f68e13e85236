"""The files of the package import each other in one direction: no circle, not even through imports inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import repquant_fx

ROOT = Path(repquant_fx.__file__).parent
PARTS = {
    "repquant_fx": ROOT,
    "repquant_fx.passes": ROOT.parent / "passes",
    "repquant_fx.exporters": ROOT.parent / "exporters",
}


def modules() -> dict[str, Path]:
    """Every module of the package by name; `passes` and `exporters` may be links within it, read in their own place."""
    found: dict[str, Path] = {}
    for package, folder in PARTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "repquant_fx" and parts[0] in ("passes", "exporters"):
                continue
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Names that a module may import when it runs; not those for type checkers alone."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
        children = list(node.orelse)
    for child in children:
        if not isinstance(child, ast.expr):  # no expression holds an import
            yield from imported(child)


def graph() -> dict[str, set[str]]:
    """The modules that each imports: `from package import name` is the module of that name, else the package."""
    known = modules()

    def module_of(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {
            found
            for name in imported(ast.parse(path.read_text(encoding="utf-8")))
            if (found := module_of(name)) not in (None, module)
        }
        for module, path in known.items()
    }  # type: ignore[misc]


def test_no_circle() -> None:
    found = graph()
    assert len(found) > 80 and "repquant_fx.preparation" in found["repquant_fx.compiler"]
    try:
        tuple(TopologicalSorter(found).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from error


def test_imports_inside_functions_count() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
        "def f():\n    from c import d"
    )
    assert list(imported(tree)) == ["typing.TYPE_CHECKING", "b", "c.d"]
