"""Whatever a document names exists: files, functions, links, every part of the paper."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, ROOT

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")
NAMED = re.compile(r"`((?:repquant_fx|passes|exporters|benchmarks|tests|examples|docs)/[\w./-]*)(?::([\w.]+))?`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _ in LINK.findall(text):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
    for path, member in NAMED.findall(text):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
        if member:
            assert has(path, member), f"{name_of(page)} names {member} in {path}"


def has(path: str, member: str) -> bool:
    """Whether a file of the tree defines `name` or `Class.name`. Scripts of benchmarks are read, not run."""
    head, *rest = member.split(".")
    if path.startswith("benchmarks/"):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        return not rest and head in {getattr(node, "name", None) for node in tree.body}
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found: object = importlib.import_module(module if module.startswith("repquant_fx") else f"repquant_fx.{module}")
    for part in (head, *rest):
        found = getattr(found, part, None) or getattr(found, "__annotations__", {}).get(part)
    return found is not None


def test_paper_page_is_complete() -> None:
    """Each equation, table, figure and the algorithm of the paper has a row; a row names code or says that there is
    none.
    """
    rows = [line for line in (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    first = " ".join(row.split("|")[1] for row in rows)
    equations = {n for a, b in re.findall(r"Eq\. (\d+)(?:–(\d+))?", first) for n in range(int(a), int(b or a) + 1)}
    figures = {n for a, b in re.findall(r"Fig\. (\d+)(?:–(\d+))?", first) for n in range(int(a), int(b or a) + 1)}
    assert equations == set(range(1, 21)) and figures == set(range(1, 12)) and "Algorithm 1" in first
    assert re.findall(r"Table ([IVX]+)\b", first) == ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]
    for row in rows:
        if re.match(r"\| (Eq|Table|Fig|Algorithm)", row):
            assert NAMED.search(row) or "`repquant-fx" in row or "No counterpart" in row, row


def test_site_builds_strictly(tmp_path: Path) -> None:
    """Links between pages, anchors, and names of the API: a warning is an error."""
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("needs mkdocs-material and mkdocstrings: pip install '.[docs]'")
    if not (ROOT / "repquant_fx/passes").is_dir():
        pytest.skip("the tree has no link repquant_fx/passes, which `make install` creates")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    passes = (tmp_path / "site/reference/passes.html").read_text(encoding="utf-8")
    assert "repquant_fx.passes.reparameterize_norms.ReparameterizeNorms" in passes
