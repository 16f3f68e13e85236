"""The user's path: commands, exit codes, files left behind."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import vit
from PIL import Image
from torch import nn

from repquant_fx.cli import main

TINY = "timm:vit_tiny_patch16_224,img_size=16,patch_size=4,embed_dim=32,depth=1,num_heads=2,num_classes=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict, a pickled model, images in class folders, arrays."""
    root = tmp_path_factory.mktemp("cli")
    module = vit(depth=1, num_classes=3)
    torch.save(module.state_dict(), root / "weights.pt")
    torch.save(module, root / "model.pt")
    generator = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (root / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    np.save(root / "data.npy", generator.standard_normal((24, 3, 16, 16), dtype=np.float32))
    return root


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, out: Path, code: int = 2) -> str:
    """Run compile, expect an exit code, one error, no traceback and no file."""
    before = set(out.parent.iterdir()) if out.parent.is_dir() else set()
    assert main(["compile", *map(str, arguments), "--out", str(out)]) == code
    error = capsys.readouterr().err
    assert error.count("repquant-fx: error: ") == 1 and "Traceback" not in error
    assert (set(out.parent.iterdir()) if out.parent.is_dir() else set()) == before
    return error


def test_compile_and_evaluate_in_a_subprocess(folder: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "model.onnx", tmp_path / "report.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "repquant_fx", "compile", str(folder / "model.pt"), "--out", str(out), "--calib",
                           str(folder / "images"), "--wbits", "4", "--abits", "4", "--report", str(report)],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "quantized 6 weighted layers" in done.stderr and "ONNX Runtime against the FX reference" in done.stderr
    assert json.loads(report.read_text())["bits"] == "W4A4"
    onnx.checker.check_model(str(out), full_check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "report.json"]
    for source in (out, folder / "model.pt"):
        shown = subprocess.run([sys.executable, "-m", "repquant_fx", "evaluate", str(source), "--data", str(folder / "images"), "--json"],
                               capture_output=True, text=True, env=environment)
        result = json.loads(shown.stdout)
        assert shown.returncode == 0 and result["samples"] == 24 and 0 <= result["top1"] <= result["top5"] == 100


def test_help_and_version_do_not_load_torch() -> None:
    code = "import sys\nfrom repquant_fx.cli import main\ntry:\n main(['--version'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_state_dict_recipe_and_switches(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("wbits: 3\nabits: 5\nlayers:\n  - {match: head, wbits: 8, abits: 8}\n  - {match: 'blocks.*.mlp.fc2', skip: true}\n")
    arguments = ["compile", folder / "weights.pt", "--arch", TINY, "--out", tmp_path / "m.onnx", "--calib", folder / "data.npy", "--recipe",
                 recipe, "--abits", "6", "--no-gptq", "--norm", "layerwise", "--softmax", "log2", "--clipping", "none", "--json"]
    assert main([str(a) for a in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits"] == "W3A6" and report["recipe"]["gptq"] is False and report["recipe"]["norm"] == "layerwise"
    weights = {e["path"]: e["weight"]["bits"] for e in report["layers"] if "weight" in e}
    assert weights["head"] == 8 and weights["blocks.0.mlp.fc1"] == 3 and "blocks.0.mlp.fc2" not in weights


def test_existing_output_needs_force(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    assert "--force" in fails(capsys, folder / "model.pt", out=out)
    assert out.read_text() == "mine"
    assert main(["compile", str(folder / "model.pt"), "--out", str(out), "--force", "--calib", str(folder / "data.npy"), "--no-check"]) == 0
    assert out.stat().st_size > 1000


def test_without_data_there_is_a_warning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(folder / "model.pt"), "--out", str(tmp_path / "m.onnx"), "--calib-samples", "16"]) == 0
    assert "accuracy will suffer" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    (["--wbits", "9"], "wbits must be an integer from 2 to 8"), (["--abits", "1"], "abits must be an integer from 2 to 8"),
    (["--wbits", "four"], "invalid int"), (["--norm", "none"], "invalid choice"), (["--wbitz", "4"], "unrecognized arguments"),
    (["--input-shape", "3,x"], "--input-shape takes positive sizes"), (["--recipe", "no.yaml"], "cannot read recipe"),
    (["--calib", "no_such_folder"], "no_such_folder"), (["--calib-samples", "0"], "samples"), (["--arch", TINY], "--arch"),
])
def test_bad_options(options: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fails(capsys, folder / "model.pt", *options, out=tmp_path / "m.onnx")


@pytest.mark.parametrize("target", ["no_folder/m.onnx", "a_file/m.onnx", "."])
def test_unwritable_outputs(target: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").write_text("x")
    assert "cannot write" in fails(capsys, folder / "model.pt", out=tmp_path / target)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


def bad_models(root: Path) -> dict[str, tuple[Path, list[str], str]]:
    """name: (file, options, what the error says)."""
    module = vit(depth=1, num_classes=3)
    whole = root / "whole.pt"
    torch.save(module, whole)
    files = {name: root / f"{name}.pt" for name in ("text", "truncated", "malicious", "hidden", "mismatch", "nan", "unknown", "relu", "flow")}
    files["text"].write_text("not a model")
    files["truncated"].write_bytes(whole.read_bytes()[:20000])
    torch.save({"model": Malicious(root / "ran")}, files["malicious"])
    hiding = nn.Sequential(nn.Linear(2, 2))
    hiding.act = functools.partial(os.system, f"touch {root / 'ran'}")
    torch.save(hiding, files["hidden"])
    state = module.state_dict()
    torch.save(state, files["unknown"])
    torch.save({**{k: v for k, v in state.items() if k != "pos_embed"}, "surplus": torch.ones(1)}, files["mismatch"])
    module.head.weight.data[0, 0] = float("nan")
    torch.save(module, files["nan"])
    torch.save(nn.Sequential(nn.ReLU()), files["relu"])
    torch.save(ControlFlow(), files["flow"])
    return {
        "missing": (root / "missing.pt", [], "does not exist"), "text": (files["text"], [], "not a model file"),
        "truncated": (files["truncated"], [], "truncated"), "malicious": (files["malicious"], [], "system"),
        "hidden": (files["hidden"], [], "system"), "mismatch": (files["mismatch"], ["--arch", TINY], "pos_embed"),
        "nan": (files["nan"], [], "head.weight"), "no arch": (files["unknown"], [], "--arch"),
        "unknown arch": (files["unknown"], ["--arch", "timm:vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        "relu": (files["relu"], ["--input-shape", "4"], "nothing to quantize"),
        "foreign class": (files["flow"], ["--input-shape", "4"], "ControlFlow"),
        "control flow": (files["flow"], ["--input-shape", "4", "--allow-pickle"], "if x.sum() > 0:"),
    }


NAMES = ["missing", "text", "truncated", "malicious", "hidden", "mismatch", "nan", "no arch", "unknown arch", "relu", "foreign class",
         "control flow"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, results = tmp_path / "models", tmp_path / "results"
    models.mkdir(), results.mkdir()
    path, options, words = bad_models(models)[name]
    assert words in fails(capsys, path, *options, out=results / "m.onnx")
    assert not (models / "ran").exists()


@pytest.mark.parametrize(("name", "words"), [("shape", "(N, 3, 16, 16)"), ("dtype", "float32"), ("inf", "infinite"), ("empty", "no images"),
                                             ("broken", "broken.png"), ("suffix", "suffix")])
def test_bad_calibration(name: str, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.load(folder / "data.npy")
    place, results = tmp_path / "calib", tmp_path / "results"
    place.mkdir(), results.mkdir()
    spec = place
    if name == "shape":
        np.save(spec := place / "x.npy", good[:, :, :8])
    elif name == "dtype":
        np.save(spec := place / "x.npy", (good * 10).astype(np.int32))
    elif name == "inf":
        good[3, 0, 0, 0] = np.inf
        np.save(spec := place / "x.npy", good)
    elif name == "broken":
        (place / "broken.png").write_bytes(b"\x89PNG but not really")
    elif name == "suffix":
        (spec := place / "x.tiff2").write_text("?")
    assert words in fails(capsys, folder / "model.pt", "--calib", spec, out=results / "m.onnx")


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(tmp_path / "none.pt"), "--out", str(tmp_path / "m.onnx"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_disagreement_is_exit_code_3(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from repquant_fx import parity

    monkeypatch.setattr(parity, "OUTPUT_LIMIT", -1.0)
    error = fails(capsys, folder / "model.pt", "--calib", folder / "data.npy", out=tmp_path / "m.onnx", code=3)
    assert "disagree" in error


def test_an_interrupt_is_exit_code_130(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repquant_fx import compiler

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "quantize_sequentially", interrupt)
    assert main(["compile", str(folder / "model.pt"), "--out", str(tmp_path / "m.onnx"), "--calib", str(folder / "data.npy")]) == 130
    assert not list(tmp_path.iterdir())


def test_a_bug_is_exit_code_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from repquant_fx import compiler

    monkeypatch.setattr(compiler, "export_onnx", lambda *a, **k: 1 / 0)
    assert main(["compile", str(folder / "model.pt"), "--out", str(tmp_path / "m.onnx"), "--calib", str(folder / "data.npy")]) == 1
    error = capsys.readouterr().err
    assert "internal error: ZeroDivisionError" in error and "Traceback" not in error and not list(tmp_path.iterdir())
