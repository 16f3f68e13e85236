"""Rows of benchmarks: what is used again, where it comes from, and what it says over several seeds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import results
from results import Results, cell, load, mean_and_spread

HERE, THERE = {"commit": "a"}, {"commit": "b"}


def never() -> dict[str, float]:
    raise AssertionError("a stored row was measured again")


def top1(value: float) -> results.Callable[[], dict[str, float]]:
    return lambda: {"top1": value}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two rows at commit a."""
    first = Results(tmp_path / "rows.json", {"samples": 8}, about=HERE)
    first.measure(("ViT", "W4A4"), 0, top1(80.0))
    first.measure(("ViT", "W4A4"), 1, top1(81.0))
    return tmp_path / "rows.json"


def test_an_interrupted_run_goes_on(path: Path) -> None:
    again = Results(path, {"samples": 8}, about=HERE)
    assert again.measure(("ViT", "W4A4"), 0, never) == ({"top1": 80.0}, False)
    assert again.measure(("ViT", "W4A4"), 2, top1(82.0)) == ({"top1": 82.0}, True)
    assert Results(path, {"samples": 8}, about=HERE).rows() == {
        ("ViT", "W4A4"): {0: {"top1": 80.0}, 1: {"top1": 81.0}, 2: {"top1": 82.0}}
    }


def test_rows_of_another_commit_are_measured_anew_and_dropped(path: Path) -> None:
    other = Results(path, {"samples": 8}, about=THERE)
    assert other.rows() == {}
    assert other.measure(("ViT", "W4A4"), 0, top1(70.0)) == ({"top1": 70.0}, True)
    stored = load(path)
    assert list(stored) == [(("ViT", "W4A4"), 0)] and stored[("ViT", "W4A4"), 0].about == THERE


def test_keep_uses_them_and_says_where_they_come_from(path: Path) -> None:
    kept = Results(path, {"samples": 9}, keep=True, about=THERE)
    assert kept.measure(("ViT", "W4A4"), 0, never)[0] == {"top1": 80.0}
    kept.measure(("ViT", "W4A4"), 5, top1(70.0))
    assert [row.about for row in load(path).values()] == [HERE, HERE, THERE]


def test_other_settings_are_another_row(path: Path) -> None:
    more = Results(path, {"samples": 16}, about=HERE)
    assert more.measure(("ViT", "W4A4"), 0, top1(83.0)) == ({"top1": 83.0}, True)
    assert load(path)[("ViT", "W4A4"), 0].settings == {"samples": 16}


def test_what_is_unknown_is_not_the_same(tmp_path: Path) -> None:
    unknown = {"commit": None}
    first = Results(tmp_path / "rows.json", about=unknown)
    first.measure(("a",), 0, top1(1.0))
    first.measure(("b",), 0, top1(2.0))
    assert first.measure(("a",), 0, never)[0] == {"top1": 1.0} and len(load(tmp_path / "rows.json")) == 2
    assert Results(tmp_path / "rows.json", about=unknown).measure(("a",), 0, top1(3.0))[1]


def test_processes_side_by_side_keep_each_others_rows(path: Path) -> None:
    one, two = (Results(path, {"samples": 8}, about=HERE) for _ in range(2))
    one.measure(("ViT", "W3A3"), 0, top1(70.0))
    two.measure(("Swin", "W3A3"), 0, top1(71.0))
    assert {key[0] for key in load(path)} == {("ViT", "W4A4"), ("ViT", "W3A3"), ("Swin", "W3A3")}


def test_a_crash_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_text()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Results(path, {"samples": 8}, about=HERE).measure(("ViT", "W3A3"), 0, top1(70.0))
    assert path.read_text() == before and os.listdir(path.parent) == [path.name]


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"ViT": {}}))
    with pytest.raises(SystemExit, match=r"rows\.json does not hold rows"):
        Results(tmp_path / "rows.json")


def test_without_a_file_rows_are_kept_in_memory() -> None:
    rows = Results(None, about=HERE)
    rows.measure(("a",), 0, top1(1.0))
    rows.measure(("b",), 0, top1(2.0))
    assert rows.measure(("a",), 0, never) == ({"top1": 1.0}, False) and len(rows.rows()) == 2


def test_the_committed_files_are_read() -> None:
    for path in results.FOLDER.glob("*.json"):
        assert load(path), path


# ---- where they come from --------------------------------------------------------------------------------------------


def test_a_commit_names_what_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    git("add", "code.py")
    git("commit", "-m", "first")
    clean = results.commit(tmp_path)
    assert clean is not None and len(clean) == 40 and not results.changes(tmp_path)
    (tmp_path / "benchmarks/results/rows.json").write_text("{}")
    assert results.commit(tmp_path) == clean, "results are no change"
    seen = {clean}
    for name, text in (("code.py", "a = 2\n"), ("code.py", "a = 3\n"), ("new.py", "b = 1\n"), ("new.py", "b = 2\n")):
        (tmp_path / name).write_text(text)
        changed = results.commit(tmp_path)
        assert changed is not None and changed.startswith(f"{clean}+") and changed not in seen
        assert name in results.changes(tmp_path)
        seen.add(changed)


def test_provenance_says_versions_and_machine_without_a_name() -> None:
    about = results.provenance()
    assert set(about) == {"commit", "versions", "machine"} and {"python", "torch"} <= set(about["versions"])
    assert about["machine"]["cpu"] and about["machine"]["cores"] >= 1
    assert set(about["machine"]["instructions"]) <= set(results.INSTRUCTIONS)
    node = platform.node()
    assert len(node) < 4 or node not in json.dumps(about)


# ---- what they say ---------------------------------------------------------------------------------------------------


def test_mean_and_spread() -> None:
    seeds = {0: {"top1": 84.0}, 1: {"top1": 85.0}, 2: {"top1": 86.0}}
    assert mean_and_spread(seeds, "top1") == (85.0, 1.0)
    assert mean_and_spread({0: {"top1": 84.0}}, "top1") == (84.0, None)
    assert cell(seeds, "top1") == "85.00 ± 1.00" and cell({0: {"top1": 84.123}}, "top1", 1) == "84.1"
    assert cell({seed: {"top1": 85.7} for seed in range(3)}, "top1") == "85.70", "no seed changes the float model"
    assert cell(None, "top1") == cell({}, "top1") == cell(seeds, "sqnr_db") == ""
