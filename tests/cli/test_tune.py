"""The command tune, as a process: a recipe that compiles, JSON on stdout, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FAST

from repquant_fx import Recipe
from repquant_fx.cli import main

# the bits of all layers are settled and attention's products float: one form is left
RECIPE = "layers:\n  - {match: '*', wbits: 8}\n  - {match: blocks.0, skip: true}\n"


def test_command_tune_then_compile(place: Path, tmp_path: Path, cli) -> None:
    start, out = tmp_path / "start.yaml", tmp_path / "fast.yaml"
    start.write_text(RECIPE)
    source = [place / "model.pt2", "--calib", place / "tokens.npy"]
    result = subprocess.run(
        [sys.executable, "-m", "repquant_fx", "tune", *map(str, source), "--recipe", str(start), *FAST, "--out",
         str(out), "--threads", "1", "--batch", "3", "--seconds", "0.01", "--max-drop", "30", "--json"],
        capture_output=True, text=True, timeout=900,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["out"] == str(out) and found["recipe"] == Recipe.from_file(out).to_dict()
    assert [form["form"] for form in found["forms"]] == ["symmetric on"]
    assert (found["target"], found["threads"], found["batch"]) == ("ort-cpu", 1, 3)
    assert found["forms"][0]["measured"]["median"] > 0 and found["quick"]["file_bytes"] > 0
    assert "times faster" in result.stderr and found["verdict"] in result.stderr
    assert f"# {found['verdict']}\n" in out.read_text()
    compiled = cli("compile", *source, "--recipe", out, "--out", tmp_path / "model.onnx")
    assert compiled.code == 0, compiled.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "fast.yaml"], "--calib"),
        (["--out", "fast.json", "--calib", "images"], ".yaml"),
        (["--out", "fast.yaml", "--calib", "images", "--target", "openvin"], "did you mean openvino?"),
        (["--out", "fast.yaml", "--calib", "images", "--target", "onnx"], "invalid choice"),
        (["--out", "fast.yaml", "--calib", "images", "--max-drop", "-1"], "--max-drop"),
        (["--out", "fast.yaml", "--calib", "no-such-folder"], "no-such-folder"),
    ],
)
def test_command_tune_refuses(
    place: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", str(place / "model.pt2"), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out and not list(tmp_path.iterdir())
