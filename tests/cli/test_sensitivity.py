"""The commands sensitivity and search, from options to the file that compile takes."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import FAST
from pictures import ARCH

from repquant_fx import Recipe
from repquant_fx.cli import main
from repquant_fx.sensitivity import Sensitivity
from repquant_fx.sensitivity.analysis import analyse


def _source(place: Path) -> list[object]:
    return [place / "weights.safetensors", "--arch", ARCH, "--calib", place / "images", *FAST]


def test_command_sensitivity(place: Path, cli) -> None:
    result = cli("sensitivity", *_source(place), "--wbits", 3, "--abits", 4, "--bits", "2,8", "--loss", "kl", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert found["loss"] == "kl" and {tuple(sorted(r["damage"])) for r in found["ranking"] if not r["pinned"]} == {
        ("2", "3", "8"),
        ("2", "4", "8"),
    }


def test_command_search_then_compile(place: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "mixed.yaml"
    result = cli(
        "search",
        *_source(place),
        "--out",
        out,
        "--max-drop",
        10,
        "--data",
        place / "images",
        "--trials",
        3,
        "--abits",
        8,
        "--json",
    )
    assert result.code == 0, result.err
    found = result.json
    assert found["recipe"] == Recipe.from_file(out).to_dict() and yaml.safe_load(out.read_text())["gptq"] is False
    assert any(t["accepted"] for t in found["trials"]) and found["bits_per_weight"] < 8
    compiled = cli("compile", *_source(place)[:5], "--recipe", out, "--out", tmp_path / "model.onnx")
    assert compiled.code == 0, compiled.err


def test_command_search_says_where_it_falls_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction has the weights that suffer the most as those that suffer the least."""
    predicted: list[Sensitivity] = []

    def wrong(*given: Any, **options: Any) -> Sensitivity:
        if not predicted:
            found = analyse(*given, **options)
            turned = {u: {b: d if b == 8 else b / d for b, d in u.damage.items()} for u in found.units}
            predicted.append(replace(found, units=tuple(replace(u, damage=turned[u]) for u in found.units)))
        return predicted[0]

    module = importlib.import_module("repquant_fx.sensitivity.search")  # the package has a function of this name
    monkeypatch.setattr(module, "analyse", wrong)
    out = tmp_path / "mixed.toml"
    arguments = ["search", *map(str, _source(place)), "--out", str(out), "--force", "--json", "--target-size", "3b",
                 "--count", "information"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["fallback"] and [t["what"] for t in found["trials"]] == ["searched bits", "uniform W3A8"]
    assert all(f"{t['what']} " in found["verdict"] and f"{t['quality']:.1f} dB" in found["verdict"]
               for t in found["trials"])
    assert f"warning: search {found['verdict']}\n" in captured.err and "trial: compiling" in captured.err
    assert f"# {found['verdict']}\n" in out.read_text() and Recipe.from_file(out).to_dict() == found["recipe"]
    assert main([*arguments, "--no-trial"]) == 0
    untried = json.loads(capsys.readouterr().out)
    assert untried["trials"] == [] and untried["verdict"] is None and untried["recipe"] != found["recipe"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of --target-size"),
        (["--target-size", "4b", "--target-sqnr", "10"], "one of --target-size"),
        (["--max-drop", "1"], "--data"),
        (["--target-size", "4b", "--data", "x"], "--data"),
        (["--target-size", "4b", "--choices", "1,9"], "--choices"),
        (["--target-sqnr", "10", "--no-trial"], "--no-trial"),
    ],
)
def test_command_search_refuses(
    place: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed.yaml"
    assert main(["search", *map(str, _source(place)), "--out", str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out and not out.exists()


def test_command_search_writes_recipes_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["search", *map(str, _source(place)), "--out", str(tmp_path / "mixed.json"), "--target-size", "4b"]) == 2
    )
    assert ".yaml" in capsys.readouterr().err
