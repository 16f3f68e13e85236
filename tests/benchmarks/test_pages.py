"""Documents hold the figures of the results and no others."""

from __future__ import annotations

import importlib
from pathlib import Path

import pages
import pytest
from results import Results

ABOUT = {"commit": "0123456789abcdef", "versions": {"python": "3", "torch": "2.15.0"},
         "machine": {"cpu": "A CPU", "instructions": ["avx2"], "cores": 2, "system": "Linux"}}
BENCHMARKS = Path(pages.__file__).parent
PAGE = """# A page

<!-- measured accuracy: methods -->
old
<!-- end -->

It keeps <!-- measured accuracy: ViT; methods; RepQuant W4A4; top1 -->old<!-- end --> % at
<!-- measured accuracy: ViT; methods; RepQuant W4A4; sqnr_db:1 -->old<!-- end --> dB.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = Results(tmp_path / "results/accuracy.json", about=ABOUT)
    for seed, top1 in enumerate((84.0, 86.0)):
        rows.measure(("ViT", "methods", "RepQuant W4A4"), seed, lambda v=top1: {"top1": v, "sqnr_db": 16.8612})
    rows.measure(("ViT", "planted", "RepQuant W4A4"), 0, lambda: {"top1": 1.0, "sqnr_db": 2.0})
    return tmp_path / "results"


def test_tables_and_figures_come_from_the_results(folder: Path) -> None:
    text = pages.written(PAGE, folder)
    assert "old" not in text and "| RepQuant W4A4 | 85.00 ± 1.41 | 16.86 |" in text
    assert "keeps <!-- measured accuracy: ViT; methods; RepQuant W4A4; top1 -->85.00 ± 1.41<!-- end --> % at" in text
    assert "-->16.9<!-- end --> dB." in text
    assert "*Seeds 0, 1; commit 012345678; A CPU, 2 cores (avx2); torch 2.15.0.*" in text
    assert "| 1.00 | 2.00 |" not in text  # another section
    assert pages.written(text, folder) == text


@pytest.mark.parametrize("old, new, reason", [
    ("methods -->\n", "nothing -->\n", "no section 'nothing'; there are 'methods', 'planted'"),
    ("; top1 -->", "; top5 -->", "no row .* with a value 'top5'"),
    ("measured accuracy: ViT", "measured lost: ViT", "lost.json holds no rows"),
])
def test_a_figure_whose_row_is_gone_is_an_error(old: str, new: str, reason: str, folder: Path) -> None:
    with pytest.raises(pages.Gone, match=reason):
        pages.written(PAGE.replace(old, new, 1), folder)


def test_the_command_checks_and_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert pages.main(["--check"], tmp_path, folder) == 1 and page.read_text() == PAGE
    assert "README.md differs from the results" in capsys.readouterr().out
    assert pages.main([], tmp_path, folder) == 0 and page.read_text() != PAGE
    assert pages.main(["--check"], tmp_path, folder) == 0


def test_the_documents_are_those_of_the_results() -> None:
    assert pages.main(["--check"]) == 0


@pytest.mark.parametrize("name", sorted(
    path.stem for path in [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("peers/*.py")] if path.stem != "tables"))
def test_every_script_finds_what_it_imports(name: str) -> None:
    importlib.import_module(name)
