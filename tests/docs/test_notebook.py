"""The notebook of the paper's figures draws every one of them from a report."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from compiled import inputs
from documents import ROOT
from helpers import vit

from repquant_fx import Recipe, compile

NOTEBOOK = ROOT / "examples/figures.ipynb"
RECIPE = {"wbits": 4, "abits": 4, "clipping": "none", "softmax_scale": "percentile", "rotate": ()}


def cells(kind: str) -> list[str]:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert stored["nbformat"] == 4 and not any(cell.get("outputs") for cell in stored["cells"])  # drawn by the reader
    return ["".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == kind]


def run(report: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figure that each cell leaves, in order."""
    monkeypatch.setenv("REPORT", str(report))
    names: dict[str, Any] = {}
    figures = []
    for source in cells("code"):
        exec(builtins.compile(source, str(NOTEBOOK), "exec"), names)
        figures.append(names.pop("figure", None))
    return figures


def test_every_figure_is_drawn_from_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    made = compile(vit(depth=1), inputs("vit"), Recipe(**RECIPE), batch_size=8, statistics=True)  # type: ignore[arg-type]
    (tmp_path / "report.json").write_text(made.report_json())
    _, layers, before, after, clipped, softmax, rounded = run(tmp_path / "report.json", monkeypatch)
    assert len(layers.data[0].x) == len([e for e in made.report["layers"] if e["sqnr_db"] is not None])
    assert len(before.data[0].median) == len(after.data[0].median) > 8
    assert len(after.layout.shapes) == 2 and len(clipped.layout.shapes) == 6 and len(clipped.data) == 3
    assert len(softmax.data) == 2 and len(softmax.layout.shapes) == 15  # levels of 4 bits beside the exact zero
    assert [bar.name for bar in rounded.data] == ["nearest", "chosen"] and sum(rounded.data[1].y) < sum(
        rounded.data[0].y)


def test_a_report_without_figures_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "report.json").write_text('{"source": "a model", "layers": []}')
    with pytest.raises(SystemExit, match="compile with --html"):
        run(tmp_path / "report.json", monkeypatch)
