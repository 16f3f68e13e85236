"""How long a function or a file may be: what is longer says why, in a sentence that begins "Long because"."""

from __future__ import annotations

import ast
from pathlib import Path

import repquant_fx

HOUSE = Path(repquant_fx.__file__).parent
PARTS = (HOUSE, *(HOUSE.parent / part for part in ("passes", "exporters", "tests", "benchmarks")))
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
EXCUSE = "Long because"

Documented = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef


def excused(node: Documented) -> bool:
    """Whether the docstring has a sentence on the length."""
    return EXCUSE in (ast.get_docstring(node) or "")


def too_long(text: str) -> list[str]:
    """What of a file is long without a reason: the file, and functions by name, each with its lines."""
    tree = ast.parse(text)
    lines = len(text.splitlines())
    long = [f"the file has {lines} lines"] if lines > LINES_OF_A_FILE and not excused(tree) else []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION and not excused(node):
                long.append(f"{node.name} has {lines} lines")
    return long


def test_nothing_is_long_without_a_reason() -> None:
    files = {path.resolve() for part in PARTS for path in part.rglob("*.py")}  # two parts may be links within the first
    assert len(files) > 200 and all(any(path.is_relative_to(part) for path in files) for part in PARTS)
    long = {str(path.relative_to(HOUSE.parent)): too_long(path.read_text(encoding="utf-8")) for path in sorted(files)}
    assert not {path: what for path, what in long.items() if what}


def test_what_is_measured() -> None:
    body = "\n".join(["    x = 0"] * LINES_OF_A_FUNCTION)
    reason = '    """Do it. Long because its steps share all they know."""\n'
    assert too_long(f"def f():\n{body}\n") == [f"f has {LINES_OF_A_FUNCTION + 1} lines"]
    assert too_long(f"class A:\n  async def f():\n{body}\n") == [f"f has {LINES_OF_A_FUNCTION + 1} lines"]
    assert not too_long(f"def f():\n{reason}{body}\n")
    lines = "x = 0\n" * LINES_OF_A_FILE
    assert not too_long(lines)
    assert too_long(f"y = 0\n{lines}") == [f"the file has {LINES_OF_A_FILE + 1} lines"]
    assert not too_long(f'"""A table. Long because it is one."""\n{lines}')


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their file names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
