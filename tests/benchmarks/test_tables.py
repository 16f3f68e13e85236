"""One command for all tables: a made-up benchmark is interrupted and goes on; what is refused and left out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
import argparse, pathlib, results
parser = argparse.ArgumentParser()
parser.add_argument("--data")
results.add_options(parser, None)
options = parser.parse_args()
log = pathlib.Path(__file__).with_suffix(".log")
found = results.Results(options.results, {{"data": options.data}}, options.keep)
for seed in options.seeds:
    def run():
        if seed == 1 and not log.with_suffix(".well").exists():
            raise SystemExit(3)
        with log.open("a") as file:
            file.write(f"{{seed}} ")
        return {{"top1": 80.0 + seed}}
    found.measure(("made up",), seed, run)
print(results.cell(found.rows()["made up",], "top1"))
"""


def load() -> object:
    """By its path: `tables` is the name of a well-known package, too."""
    spec = importlib.util.spec_from_file_location("benchmark_tables", BENCHMARKS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tables = load()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark that fails at its second seed until a file says that all is well."""
    path = tmp_path / "made_up.py"
    path.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    given = tables.Benchmark("made_up", (str(path),), lambda sources: ["--data", str(sources.file("images"))])
    lost = tables.Benchmark("lost", (str(path),), lambda sources: [str(sources.file("nowhere"))])
    monkeypatch.setattr(tables, "BENCHMARKS", (given, lost))
    (tmp_path / "data/images").mkdir(parents=True)
    return path


def run(script: Path, *more: str) -> int:
    return tables.main(["--data", str(script.parent / "data"), "--folder", str(script.parent), *more])


def test_an_interrupted_run_goes_on(
    script: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "changes", lambda: "")
    log = script.with_suffix(".log")
    assert run(script) == 1
    out = capfd.readouterr().out
    assert "made_up: failed with exit code 3" in out and "lost: left out, nowhere is not in the data" in out
    assert log.read_text() == "0 "
    log.with_suffix(".well").touch()
    assert run(script) == 0 and log.read_text() == "0 1 2 "
    assert "81.00 ± 1.00" in capfd.readouterr().out
    assert run(script, "--only", "made_up") == 0 and log.read_text() == "0 1 2 "
    rows = results.load(script.with_suffix(".json"))
    assert {seed for _, seed in rows} == {0, 1, 2}
    assert all(set(row.about) == {"commit", "versions", "machine"} for row in rows.values())


def test_a_tree_with_changes_is_refused(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "changes", lambda: " M repquant_fx/ops.py\ndiff --git a/repquant_fx/ops.py")
    ran: list[str] = []
    monkeypatch.setattr(tables, "run_all", lambda chosen, *_: ran.extend(each.name for each in chosen))
    assert run(script) == 2 and not ran
    said = capsys.readouterr().err
    assert "commit them" in said and "ops.py" in said and "diff --git" not in said
    assert run(script, "--dirty", "--only", "lost") == 0 and ran == ["lost"]


def test_list_runs_nothing(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["made_up", "lost"]
    assert not script.with_suffix(".json").exists()


def test_every_benchmark_is_a_script_with_a_file_of_its_own() -> None:
    names = [each.name for each in tables.BENCHMARKS]
    assert len(set(names)) == len(names) and all((BENCHMARKS / each.script[0]).is_file() for each in tables.BENCHMARKS)
    seeded = {each.script[0]: each.seeds for each in tables.BENCHMARKS}
    for script, seeds in seeded.items():
        text = (BENCHMARKS / script).read_text(encoding="utf-8")
        assert "add_options(" in text or "from common import" in text, f"{script} keeps no rows"
        assert seeds != ("seeds=False" in text), script


def test_a_part_without_data_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").touch()
    sources = tables.Sources(tmp_path, tmp_path / "work")
    parts = [lambda s, n=name: [str(s.file(n))] for name in ("here", "nowhere")]
    assert tables.some(sources, *parts) == [str(tmp_path / "here")]
    assert "a part is left out: nowhere is not in the data" in capsys.readouterr().out
    with pytest.raises(tables.Absent, match="nowhere"):
        tables.some(sources, parts[1])


def test_archives_are_unpacked_once(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "top/cat").mkdir(parents=True)
    (tmp_path / "top/dog").mkdir()
    (tmp_path / "data/cifar10").mkdir(parents=True)
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"data/cifar10/{name}.tar", "w") as archive:
            archive.add(tmp_path / "top", name)
    sources = tables.Sources(tmp_path / "data", tmp_path / "work")
    found = sources.images()
    assert found[::2] == ["--calib", "--data"]
    assert all(sorted(p.name for p in Path(folder).iterdir()) == ["cat", "dog"] for folder in found[1::2])
    (tmp_path / "data/cifar10/train.tar").unlink()
    assert sources.images() == found
    with pytest.raises(tables.Absent, match="no folder found"):
        tables.Sources(None, tmp_path / "other").images()
