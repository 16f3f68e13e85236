"""The table of parts lists the folders and files that exist, all of them."""

from __future__ import annotations

import re

from documents import ROOT

TOP = {"passes", "exporters", "tests", "benchmarks", "docs", "examples"}


def listed() -> set[str]:
    """Paths in the table's first column; a name after another one in its row is beside that one."""
    section = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    paths = set()
    for row in re.findall(r"^\| (`.*?) \|", section, re.M):
        for name in re.findall(r"`([^`]+)`", row):
            top = "/" in name and name.split("/")[0] in TOP | {"repquant_fx"}
            paths.add((name if top else f"repquant_fx/{name}").rstrip("/"))
    return paths


def test_the_table_lists_what_exists() -> None:
    package = ROOT / "repquant_fx"
    parts = {
        f"repquant_fx/{path.name}"
        for path in package.iterdir()
        if not path.is_symlink()
        and not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert listed() == parts | TOP
