"""inspect, recipe and completion on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from helpers import FAST
from pictures import ARCH

from repquant_fx import Recipe
from repquant_fx.cli import COMMANDS, main


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "m.onnx"
    source = [str(place / "weights.safetensors"), "--calib", str(place / "calib.npy")]
    assert main(["compile", *source, "--wbits", "4", "--out", str(out), "--quiet", *FAST]) == 0
    return out


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "repquant_fx", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, "OMP_NUM_THREADS": "1"},
    )


def test_a_file_for_people_and_for_programs(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call("inspect", exported)
    assert found.returncode == 0 and found.stderr == ""
    lines = found.stdout.splitlines()
    (qkv,) = (line for line in lines if line.startswith("blocks.0.attn.qkv/input"))
    assert (
        "norm → linear" in qkv
        and "W4A8" in qkv
        and "uniform" in qkv
        and "kB" in qkv
        and "channel scales spanned" in qkv
    )
    (softmax,) = (line for line in lines if line.startswith("blocks.0.attn/probabilities"))
    assert "softmax → matmul" in softmax and "log2" in softmax and "255" in softmax
    assert any(line.startswith(f"{exported}: W4A8, RepQuant") for line in lines) and any(
        "10 quantized sites" in line for line in lines
    )
    assert main(["inspect", str(exported), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    about = data["about"]
    assert f"{about['weighted_layers']} weighted layers and {about['products']} products read 10 " in found.stdout
    assert data["compiled"] and len(data["rows"]) == 10 and data["about"]["recipe"]["wbits"] == 4


@pytest.mark.parametrize("columns, lines", [(100, 1), (80, 3)])
def test_the_table_fits_a_narrow_terminal(exported: Path, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """A line per site, a few where its name alone is long; what was rewritten stands below."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", str(exported)]) == 0
    table, notes, *_ = capsys.readouterr().out.split("\n\n")
    rows = table.splitlines()[1:]
    assert max(map(len, rows)) <= columns and len(rows) <= 10 * lines and table.count("W4A8") >= 4
    assert (
        "rewritten" not in table
        and notes.startswith("rewritten\n")
        and "channel scales spanned" in notes.replace("\n", " ")
    )


def test_a_model_before_compiling(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (ARCH, str(place / "model.pt2")):
        assert main(["inspect", source, "--wbits", "3", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert not data["compiled"] and {tuple(row["weight_bits"]) for row in data["rows"] if row["weight_bits"]} <= {
            (3,),
            (3, 3),
            (3, 3, 3),
        }
        assert main(["inspect", source]) == 0
        assert "what `compile` would do, W8A8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect", "missing.onnx"], "no such file"),
        (["inspect", "EXPORTED", "--wbits", "3"], "holds its recipe"),
        (["recipe"], "ACTION"),
        (["recipe", "show", "missing.yaml"], "missing.yaml"),
        (["recipe", "show", "missing.onnx"], "no such file"),
        (["recipe", "init", "--out", "r.json"], ".toml"),
        (["recipe", "init", "--out", "r.yaml", "--format", "toml"], "named like yaml"),
        (["recipe", "init", "--wbits", "12"], "2 to 8"),
        (["completion", "cmd"], "bash"),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: str,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(exported) if a == "EXPORTED" else a for a in arguments]) == 2
    found = capsys.readouterr()
    assert words in found.err and found.out == "" and not list(tmp_path.iterdir())


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["yaml", "toml"])
def test_init_writes_what_compile_reads(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"r.{form}"
    assert main(["recipe", "init", "--preset", "repq-vit", "--wbits", "4", "--abits", "6", "--out", str(path)]) == 0
    assert path.read_text().count("#") > 20
    from repquant_fx import repq_vit

    assert Recipe.from_file(path) == repq_vit(4, 6)
    assert main(["recipe", "init", "--out", str(path)]) == 2 and "--force" in capsys.readouterr().err
    assert main(["recipe", "init", "--format", form]) == 0 and capsys.readouterr().out.startswith("# A recipe")


def test_the_recipe_of_a_file_feeds_back_to_the_same_file(
    exported: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "show", str(exported)]) == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    for index, recipe in enumerate((exported, tmp_path / "r.yaml")):
        out = tmp_path / f"{index}.onnx"
        assert (
            main(
                [
                    "compile",
                    str(place / "weights.safetensors"),
                    "--calib",
                    str(place / "calib.npy"),
                    "--recipe",
                    str(recipe),
                    "--out",
                    str(out),
                    "--no-check",
                    "--quiet",
                ]
            )
            == 0
        )
        assert out.read_bytes() == exported.read_bytes()
    assert main(["recipe", "show", str(exported), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert main(["recipe", "schema"]) == 0
    jsonschema.validate(data, json.loads(capsys.readouterr().out))


# ---- completion ------------------------------------------------------------------------------------------------------


def completions(line: str, tmp_path: Path) -> list[str]:
    """What bash would offer, asked the way the printed code asks."""
    script = tmp_path / "complete.sh"
    script.write_text(
        f'repquant-fx() {{ "{sys.executable}" -m repquant_fx "$@"; }}\n'
        f'exec 8> "{tmp_path}/offers" 9>/dev/null\n'
        f"export _ARGCOMPLETE=1 _ARGCOMPLETE_IFS=$'\\n' COMP_LINE=\"{line}\" COMP_POINT={len(line)} "
        "COMP_TYPE=9\nrepquant-fx\n"
    )
    subprocess.run(["bash", str(script)], check=True)
    return [offer.strip() for offer in (tmp_path / "offers").read_text().splitlines()]


def test_a_shell_completes_commands_options_and_values(tmp_path: Path) -> None:
    assert set(COMMANDS) <= set(completions("repquant-fx ", tmp_path))
    assert {"--wbits", "--weights", "--recipe"} <= set(completions("repquant-fx compile m.pt2 --", tmp_path))
    assert completions("repquant-fx compile m.pt2 --clipping s", tmp_path) == ["search"]
    assert completions("repquant-fx recipe sc", tmp_path) == ["schema"]


@pytest.mark.parametrize(
    "shell, word", [("bash", "complete "), ("zsh", "compdef"), ("fish", "complete --command repquant-fx")]
)
def test_code_for_each_shell(shell: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert word in code and "repquant-fx" in code
    if shell == "bash":
        checked = subprocess.run(
            ["bash", "-c", f"{code}\ncomplete -p repquant-fx"], capture_output=True, text=True, check=True
        )
        assert "repquant-fx" in checked.stdout
