"""The command line: every switch, every way to fail, and what is left on the disk.

Long because all of it starts from one compiled place.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import FAST, Encoder, redraw, sequences, vit
from pictures import ARCH, predictions_of
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import repquant_fx
from repquant_fx import Recipe, repq_vit
from repquant_fx import compiler as compiler_module
from repquant_fx.cli import main, parser
from repquant_fx.cli.method import recipe_from
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.recipe import CHOICES
from repquant_fx.runtime import session


@pytest.fixture
def refused(cli, tmp_path: Path):
    """Compile must fail with one error that holds all `words`, exit code 2, nothing on stdout, no traceback and no
    file.
    """
    def run(*arguments: object, words: tuple[str, ...], code: int = 2) -> str:
        results = tmp_path / "results"
        results.mkdir(exist_ok=True)
        found = cli("compile", *arguments, "--out", results / "m.onnx", "--report", results / "r.json", "--json")
        assert found.code == code, found.err
        assert found.err.count("error:") == 1 and "repquant-fx: error: " in found.err and "Traceback" not in found.err
        for word in words:
            assert word in found.err, found.err
        assert found.out == "" and not list(results.iterdir())
        return found.err
    return run


def subprocess_of(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "repquant_fx", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def encoder_pt2(place: Path) -> list[object]:
    """The quickest model to compile."""
    return ["compile", place / "model.pt2", "--calib", place / "tokens.npy", *FAST]


# ---- options ---------------------------------------------------------------------------------------------------------


def parsed(*switches: str) -> Recipe:
    return recipe_from(parser().parse_args(["compile", "m.pt2", "--out", "m.onnx", *switches]))


OTHER_VALUES: dict[str, tuple[list[str], Any]] = {
    "wbits": (["--wbits", "3"], 3),
    "abits": (["--abits", "5"], 5),
    "input_bits": (["--input-bits", "6"], 6),
    "percentile": (["--percentile", "99.5"], 99.5),
    "symmetric": (["--symmetric"], True),
    "group_size": (["--group-size", "32"], 32),
    "activation_affine": (["--no-activation-affine"], False),
    "balance": (["--no-balance"], False),
    "normalize_rows": (["--no-normalize-rows"], False),
    "correction": (["--no-correction"], False),
    "gptq": (["--no-gptq"], False),
    "gptq_damping": (["--gptq-damping", "0.1"], 0.1),
    "gptq_block": (["--gptq-block", "32"], 32),
    "gptq_activation_order": (["--no-gptq-activation-order"], False),
    "reconstruct": (["--reconstruct"], 400),
    "rotate": (["--rotate", "residual,heads"], ["residual", "heads"]),
    "equalize": (["--equalize", "query_key,linear"], ["query_key", "linear"]),
}


def test_every_setting_has_a_switch() -> None:
    assert {f.name for f in fields(Recipe)} - {"layers"} == set(OTHER_VALUES) | set(CHOICES)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_switch_sets_its_setting_and_no_other(name: str) -> None:
    switches, value = OTHER_VALUES[name]
    assert value != getattr(Recipe(), name)
    assert parsed(*switches).to_dict() == {**Recipe().to_dict(), name: value}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in CHOICES.items() for v in values])
def test_every_choice(name: str, value: str) -> None:
    assert parsed(f"--{name.replace('_', '-')}", value).to_dict() == {**Recipe().to_dict(), name: value}


def test_presets() -> None:
    assert parsed() == parsed("--preset", "repquant") == Recipe(wbits=8, abits=8)
    assert parsed("--preset", "repq-vit", "--wbits", "4", "--abits", "4") == repq_vit(4, 4)
    # switches go on top
    assert parsed("--preset", "repq-vit", "--gptq", "--clipping", "adam") == repq_vit(8, 8, gptq=True, clipping="adam")


@pytest.mark.parametrize("suffix, text", [
    (".yaml", "wbits: 4\nabits: 6\ngptq: false\nlayers:\n  - {match: head, wbits: 8}\n"),
    (".toml", "wbits = 4\nabits = 6\ngptq = false\n[[layers]]\nmatch = 'head'\nwbits = 8\n")])
def test_a_recipe_file_and_switches_on_top(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_text(text)
    found = parsed("--recipe", str(path))
    assert (found.wbits, found.abits, found.gptq) == (4, 6, False) and found.layers[0].match == "head"
    on_top = parsed("--recipe", str(path), "--abits", "5", "--gptq", "--norm", "layerwise")
    assert (on_top.wbits, on_top.abits, on_top.gptq, on_top.norm) == (
        4,
        5,
        True,
        "layerwise",
    ) and on_top.layers == found.layers


def test_switches_reach_report_and_file(place: Path, tmp_path: Path, cli) -> None:
    """One compilation with nearly everything off its default."""
    places = ["--calib", place / "calib.npy", "--out", tmp_path / "m.onnx", "--report", tmp_path / "r.json"]
    numbers = "--calib-samples 12 --batch-size 4 --seed 3 --wbits 5 --abits 6 --input-bits 7 --percentile 99.9"
    names = "--norm layerwise --softmax log2 --softmax-scale percentile --clipping none --activations percentile"
    weights = "--weights minmax --no-correction --gptq-damping 0.02 --gptq-block 16 --no-gptq-activation-order"
    switches = f"--json {numbers} {names} {weights}".split()
    found = cli("compile", place / "weights.pt", "--arch", ARCH, *places, *switches)
    assert found.code == 0, found.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert found.json == {"out": str(tmp_path / "m.onnx"), **report}
    assert (
        report["recipe"]
        == Recipe(
            wbits=5,
            abits=6,
            input_bits=7,
            norm="layerwise",
            softmax="log2",
            softmax_scale="percentile",
            clipping="none",
            activations="percentile",
            percentile=99.9,
            weights="minmax",
            correction=False,
            gptq_damping=0.02,
            gptq_block=16,
            gptq_activation_order=False,
        ).to_dict()
    )
    assert (
        report["calibration"]["samples"] == 9
        and report["calibration"]["held_back"] == 3
        and report["calibration"]["seed"] == 3
    )
    layers = {e["path"]: e for e in report["layers"] if "weight" in e}
    assert layers["patch_embed.proj"]["inputs"][0]["bits"] == 7 and layers["head"]["inputs"][0]["bits"] == 6
    assert layers["head"]["weight"]["bits"] == 5 and layers["head"]["weight"]["method"] == "GPTQ"
    assert layers["blocks.0.attn.qkv"]["rewritten"] == []
    softmax = next(i for e in report["layers"] for i in e["inputs"] if i["name"].endswith("probabilities"))
    assert "log2" in softmax["quantizer"]
    model = onnx.load(str(tmp_path / "m.onnx"))
    assert report["file_bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert json.loads({e.key: e.value for e in model.metadata_props}["repquant_fx.recipe"]) == report["recipe"]
    assert "W5A6" in found.err and f"wrote {tmp_path / 'm.onnx'}" in found.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r.json"]


def test_without_json_stdout_is_empty(place: Path, tmp_path: Path, cli) -> None:
    found = cli(*encoder_pt2(place), "--out", tmp_path / "m.onnx", "--no-check")
    assert found.code == 0 and found.out == "" and "ONNX Runtime against" not in found.err
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--version"], [f"repquant-fx {repquant_fx.__version__}"]),
        (["--help"], ["compile", "evaluate"]),
        (["compile", "--help"], ["--wbits", "--preset", "--gptq", "--allow-pickle"]),
        (["evaluate", "--help"], ["--data"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        shown = capsys.readouterr().out
        assert caught.value.code == 0 and all(w in shown for w in words)


# ---- output files ----------------------------------------------------------------------------------------------------


def test_force_replaces_both_files_and_without_it_neither(place: Path, tmp_path: Path, cli) -> None:
    out, report = tmp_path / "m.onnx", tmp_path / "r.json"
    report.write_text("mine")
    found = cli(*encoder_pt2(place), "--out", out, "--report", report)
    assert found.code == 2 and "--force" in found.err and str(report) in found.err
    assert report.read_text() == "mine" and not out.exists()
    out.write_text("mine too")
    assert cli(*encoder_pt2(place), "--out", out, "--report", report, "--force", "--no-check").code == 0
    assert json.loads(report.read_text())["bits"] == "W8A8"
    onnx.checker.check_model(str(out))


def test_model_and_report_need_two_names(place: Path, tmp_path: Path, cli) -> None:
    found = cli(*encoder_pt2(place), "--out", tmp_path / "same", "--report", tmp_path / "x" / ".." / "same")
    assert found.code == 2 and not list(tmp_path.iterdir())
    found = cli(*encoder_pt2(place), "--out", tmp_path / "same", "--report", tmp_path / "same")
    assert found.code == 2 and "same file" in found.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize("target", ["missing/x", "file/x", "folder.onnx"])
def test_unwritable_before_anything_is_loaded(option: str, target: str, tmp_path: Path, cli) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    other = ["--report", tmp_path / "r"] if option == "--out" else ["--out", tmp_path / "m.onnx"]
    found = cli("compile", "no such model", option, tmp_path / target, *other, "--force")
    assert found.code == 2 and "cannot write" in found.err and str(tmp_path / target) in found.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_a_failed_run_leaves_the_old_file(place: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    monkeypatch.setattr(compiler_module, "export_onnx", lambda *a, **k: 1 / 0)
    assert cli(*encoder_pt2(place), "--out", out, "--force").code == 1
    assert out.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches, words",
    [
        (["--wbits", "9"], ["wbits", "2 to 8", "9"]),
        (["--wbits", "1"], ["wbits", "1"]),
        (["--abits", "0"], ["abits"]),
        (["--abits", "-4"], ["abits"]),
        (["--input-bits", "16"], ["input_bits", "16"]),
        (["--wbits", "4.5"], ["--wbits", "4.5"]),
        (["--percentile", "101"], ["percentile"]),
        (["--percentile", "nan"], ["percentile"]),
        (["--gptq-damping", "-1"], ["gptq_damping"]),
        (["--gptq-block", "0"], ["gptq_block"]),
        (["--softmax", "log3"], ["log3"]),
        (["--preset", "other"], ["other"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--calib-samples", "-1"], ["samples"]),
        (["--input-shape", "3,0,16"], ["--input-shape"]),
        (["--input-shape", ""], ["--input-shape"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_options_out_of_range(switches: list[str], words: list[str], place: Path, refused) -> None:
    refused(place / "weights.safetensors", *switches, words=tuple(words))


@pytest.mark.parametrize(
    "text, words",
    [
        ("wbits: 12\n", ["wbits", "12"]),
        ("wbitz: 4\n", ["wbitz", "did you mean 'wbits'"]),
        ("wbits: [\n", ["not valid YAML"]),
        ("- 4\n", ["table"]),
        ("layers: [{wbits: 4}]\n", ["match"]),
        ("layers: [{match: a, abits: 1}]\n", ["layers[0].abits"]),
    ],
)
def test_bad_recipes(text: str, words: list[str], tmp_path: Path, place: Path, refused) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    refused(place / "weights.safetensors", "--recipe", path, words=tuple(words))


def test_recipe_and_preset(tmp_path: Path, place: Path, refused) -> None:
    (tmp_path / "r.yaml").write_text("wbits: 4\n")
    refused(place / "weights.safetensors", "--recipe", tmp_path / "r.yaml", "--preset", "repq-vit", words=("not both",))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "COMMAND"),
        (["quantize"], "quantize"),
        (["compile"], "model"),
        (["compile", "m.pt"], "--out"),
        (["evaluate", "m.onnx"], "--data"),
        (["compile", "m.pt", "--out"], "--out"),
        (["compile", "a", "b", "--out", "c"], "b"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = cli(*arguments)
    assert found.code == 2 and words in found.err and "--help" in found.err and len(found.err.splitlines()) == 1
    assert "Traceback" not in found.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, words", [
    ("text.pt", b"hello, I am a text\n", ["text file", "hello"]), ("empty.pt", b"", ["is empty"]),
    ("noise.pt2", bytes(range(128, 256)), ["begins with the bytes"]),
    ("model.onnx", b"\x08\x0apytorch", ["ONNX model"]),
    ("plain.pkl", b"\x80\x04N.", ["plain Python pickle"]),
    ("zip.pt", b"PK\x03\x04 nothing", ["truncated or damaged"]),
])
def test_not_a_model_file(name: str, content: bytes, words: list[str], tmp_path: Path, refused) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, words=("not a model file", str(path), *words))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "model.pt2"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_truncated(name: str, share: float, place: Path, tmp_path: Path, refused) -> None:
    data = (place / name).read_bytes()
    (tmp_path / name).write_bytes(data[:int(len(data) * share)])
    refused(tmp_path / name, words=("truncated or damaged", name))


def test_missing_and_folder(tmp_path: Path, refused) -> None:
    refused(tmp_path / "none.pt", words=("does not exist",))
    refused(tmp_path, words=("is a directory",))


def test_a_class_that_cannot_be_imported(tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved where its module was at hand, loaded where it is not: with and without consent."""
    (tmp_path / "elsewhere_models.py").write_text("from torch import nn\nclass Own(nn.Linear):\n    pass\n")
    with monkeypatch.context() as context:
        context.syspath_prepend(str(tmp_path))
        import elsewhere_models  # type: ignore[import-not-found]

        torch.save(elsewhere_models.Own(4, 4), tmp_path / "m.pt")
    del sys.modules["elsewhere_models"]
    (tmp_path / "elsewhere_models.py").unlink()
    refused(tmp_path / "m.pt", "--input-shape", "4", words=("elsewhere_models",))
    refused(tmp_path / "m.pt", "--input-shape", "4", "--allow-pickle", words=("elsewhere_models",))


@pytest.mark.parametrize(
    "arch, words",
    [
        ("timm:vit_tinny_patch16_224", ["vit_tiny_patch16_224"]),
        ("timm:no_such_thing_at_all", ["no_such_thing_at_all"]),
        ("hub:vit", ["hub"]),
        (ARCH + ",colour=3", ["colour"]),
        ("timm:", ["timm:"]),
        (ARCH.replace("num_heads=2", "num_heads=5"), ["cannot be built"]),
    ],
)
def test_unknown_architecture(arch: str, words: list[str], place: Path, refused) -> None:
    refused(place / "weights.pt", "--arch", arch, words=tuple(words))
    refused(arch, words=()) if arch.startswith("timm:") else None


def test_architecture_of_a_whole_model(place: Path, refused) -> None:
    refused(place / "model.pt2", "--arch", ARCH, words=("--arch", "whole model"))
    refused(place / "weights.pt", words=("no architecture", "--arch"))


def test_state_dict_mismatch_names_the_keys(place: Path, tmp_path: Path, refused) -> None:
    state = torch.load(place / "weights.pt")
    state["blocks.0.norm1.extra"] = state.pop("blocks.0.norm1.weight")
    torch.save(state, tmp_path / "renamed.pt")
    refused(
        tmp_path / "renamed.pt",
        "--arch",
        ARCH,
        words=("1 missing: blocks.0.norm1.weight", "1 unexpected: blocks.0.norm1.extra"),
    )
    refused(place / "weights.pt", "--arch", ARCH.replace("num_classes=5", "num_classes=7"),
            words=("head.weight is [5, 32] instead of [7, 32]", "head.bias"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, place: Path, tmp_path: Path, refused) -> None:
    state = torch.load(place / "weights.pt")
    state["blocks.0.mlp.fc1.weight"][1, 2] = value
    save_file(state, tmp_path / "m.safetensors", {"arch": ARCH})
    refused(tmp_path / "m.safetensors", words=("NaN or infinite weights", "blocks.0.mlp.fc1.weight"))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x[:, :1], ["(N, 3, 16, 16)", "(16, 1, 16, 16)"]),
        (lambda x: x[0], ["first dimension must be the batch"]),
        (lambda x: x.transpose(0, 2, 3, 1), ["channels must come before"]),
        (lambda x: x.astype(np.int64), ["float32", "int64"]),
        (lambda x: (x * 9).astype(np.uint8), ["uint8", "preprocessed"]),
        (lambda x: x.astype(object), ["plain arrays"]),
        (lambda x: x[:0], ["no samples"]),
        (
            lambda x: np.where(np.arange(16).reshape(-1, 1, 1, 1) == 5, np.nan, x).astype(np.float32),
            ["NaN or infinite", "sample 5"],
        ),
        (
            lambda x: np.where(np.arange(16).reshape(-1, 1, 1, 1) == 7, np.inf, x).astype(np.float32),
            ["NaN or infinite", "sample 7"],
        ),
    ],
    ids=["channels", "no-batch", "channels-last", "int64", "uint8", "objects", "none", "nan", "inf"],
)
def test_calibration_that_does_not_fit(change, words: list[str], place: Path, tmp_path: Path, refused) -> None:
    path = saved(tmp_path / "bad.npy", change(np.load(place / "calib.npy")))
    refused(place / "weights.safetensors", "--calib", path, words=(str(path), *words))


def test_calibration_folders(place: Path, tmp_path: Path, refused) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    model = place / "weights.safetensors"
    refused(model, "--calib", folder, words=("no images", "it is empty", str(folder)))
    (folder / "notes.txt").write_text("no picture")
    refused(model, "--calib", folder, words=("no images",))
    Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    whole = (folder / "good.png").read_bytes()
    (folder / "half.jpg").write_bytes(whole[:len(whole) // 2])
    refused(model, "--calib", folder, words=("broken.png", "half.jpg"))
    refused(model, "--calib", tmp_path / "nowhere", words=("does not exist", "nowhere"))


def test_calibration_callables(place: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cli_data.py").write_text("def fails():\n    raise ValueError('no luck')\nnumber = 3\n")
    model = place / "weights.safetensors"
    refused(model, "--calib", "my_cli_data:fails", words=("my_cli_data:fails", "ValueError: no luck"))
    refused(model, "--calib", "my_cli_data:other", words=("has no other",))
    refused(model, "--calib", "my_cli_data:number", words=("not callable",))
    refused(model, "--calib", "no_such_module_here:data", words=("no module no_such_module_here",))


CONTROL_FLOW = """\
import torch
from torch import nn

class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.mean() > 0:
            return self.fc(x)
        return x
"""


def test_control_flow_names_the_line(tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flow_models.py").write_text(CONTROL_FLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    import flow_models  # type: ignore[import-not-found]

    torch.save(flow_models.Flow(), tmp_path / "m.pt")
    refused(
        tmp_path / "m.pt",
        "--allow-pickle",
        "--input-shape",
        "4",
        words=("flow_models.py:10", "if x.mean() > 0:", "torch.where"),
    )
    refused(tmp_path / "m.pt", "--input-shape", "4", words=("flow_models",))


def test_nothing_to_quantize(tmp_path: Path, refused, place: Path) -> None:
    torch.save(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "--input-shape", "4", words=("nothing to quantize",))
    (tmp_path / "r.yaml").write_text("layers: [{match: '*', skip: true}]\n")
    refused(place / "weights.safetensors", "--recipe", tmp_path / "r.yaml", words=("nothing to quantize", "recipe"))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_does_not_run(tmp_path: Path, refused, cli) -> None:
    marker = tmp_path / "it ran"
    torch.save({"state_dict": vit(depth=1).state_dict(), "extra": Hostile(marker)}, tmp_path / "m.pt")
    error = refused(tmp_path / "m.pt", "--arch", ARCH, words=("mkdir",))
    assert "--allow-pickle" in error and not marker.exists()
    found = cli("evaluate", tmp_path / "m.pt", "--data", tmp_path)
    assert found.code == 2 and not marker.exists()


# ---- exit codes ------------------------------------------------------------------------------------------------------


def test_a_wrong_file_is_not_written(place: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    export = compiler_module.export_onnx

    def wrong(*arguments: Any, **options: Any) -> OnnxModel:
        model = export(*arguments, **options)
        tensor = next(t for t in model.proto.graph.initializer if t.name == "head.weight_scale")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
        return model

    monkeypatch.setattr(compiler_module, "export_onnx", wrong)
    refused(*encoder_pt2(place)[1:], words=("disagree beyond float rounding", "output"), code=3)


def test_debug_shows_a_traceback_and_keeps_the_code(tmp_path: Path, cli) -> None:
    found = cli("compile", tmp_path / "none.pt", "--out", tmp_path / "m.onnx", "--debug")
    assert (
        found.code == 2
        and "Traceback" in found.err
        and "repquant-fx: error: not a model file" in found.err
        and not list(tmp_path.iterdir())
    )


def test_subprocess_success(place: Path, tmp_path: Path) -> None:
    done = subprocess_of(
        *encoder_pt2(place), "--wbits", "4", "--out", "m.onnx", "--report", "r.json", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits"] == "W4A8" and "Warning" not in done.stderr and "W4A8" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r.json"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    # the same command in this process gives the same file
    assert main([str(a) for a in [*encoder_pt2(place), "--wbits", "4", "--out", tmp_path / "again.onnx"]]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_subprocess_bad_input(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_text("no model")
    done = subprocess_of("compile", "bad.pt", "--out", "m.onnx", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("repquant-fx: error: not a model file") and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


def test_subprocess_control_flow_is_quiet(tmp_path: Path) -> None:
    """torch.export logs a failure at length; the user gets one message."""
    (tmp_path / "quiet_models.py").write_text(CONTROL_FLOW)
    script = "import torch, quiet_models; torch.save(quiet_models.Flow(), 'm.pt')"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    done = subprocess_of("compile", "m.pt", "--allow-pickle", "--input-shape", "4", "--out", "m.onnx", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "quiet_models.py:10" in done.stderr
        and "Traceback" not in done.stderr
        and done.stdout == ""
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "m.onnx").exists()


def test_subprocess_interrupt(place: Path, tmp_path: Path) -> None:
    """Ctrl-C while the data is read."""
    (tmp_path / "slow_data.py").write_text(textwrap.dedent("""
        import pathlib, time
        def batches():
            pathlib.Path("started").touch()
            time.sleep(120)
    """))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "repquant_fx",
            "compile",
            str(place / "model.pt2"),
            "--calib",
            "slow_data:batches",
            "--out",
            "m.onnx",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        while not (tmp_path / "started").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and "interrupted" in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slow_data.py", "started"]


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_file_and_source(place: Path, tmp_path: Path, cli) -> None:
    """Both as timm's own preprocessing and the model itself say: 35 of 40 pictures stand in the folder that the float
    model sees.
    """
    source = cli("evaluate", place / "weights.safetensors", "--data", place / "images", "--json", "--batch-size", "7")
    assert source.code == 0, source.err
    assert source.json == {
        "model": str(place / "weights.safetensors"),
        "top1": 87.5,
        "top5": 100.0,
        "samples": 40,
        "classes": 5,
    }
    out = tmp_path / "m.onnx"
    assert (
        cli(
            "compile", place / "weights.safetensors", "--calib", place / "images", "--out", out, "--no-check", *FAST
        ).code
        == 0
    )
    predict = predictions_of(vit(depth=1))
    runner = session(out, threads=1)
    files = sorted((place / "images").rglob("*.png"))
    batch = np.stack([predict.transform(Image.open(path)).numpy() for path in files])
    labels = np.array([int(path.parent.name[-1]) for path in files])
    expected = 100 * float((runner.run(None, {"x": batch})[0].argmax(1) == labels).mean())
    quantized = cli("evaluate", out, "--data", place / "images", "--json", "--threads", "1")
    assert quantized.code == 0 and quantized.json["samples"] == 40
    assert abs(quantized.json["top1"] - expected) <= 2.5 and quantized.json["top1"] >= 70  # a near tie may turn
    few = cli("evaluate", out, "--data", place / "images", "--limit", "9", "--seed", "4")
    assert few.code == 0 and "(9 images)" in few.out and "top-1" in few.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.onnx", "--data", "{images}"], "no such file"),
        (["{weights}", "--data", "nowhere"], "nowhere"),
        (["{weights}", "--data", "{images}", "--limit", "0"], "at least 1"),
        (["{weights}", "--data", "{images}", "--batch-size", "0"], "at least 1"),
        (["{text}", "--data", "{images}"], "is not an ONNX model"),
        (["{model}", "--data", "{images}"], "pictures|images|image"),
    ],
)
def test_evaluate_refuses(arguments: list[str], words: str, place: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "text.onnx").write_text("I am no model")
    names = {
        "images": place / "images",
        "weights": place / "weights.safetensors",
        "text": tmp_path / "text.onnx",
        "model": place / "model.pt2",
    }
    found = cli("evaluate", *[a.format(**names) for a in arguments])
    assert (
        found.code == 2
        and found.err.count("repquant-fx: error:") == 1
        and "Traceback" not in found.err
        and found.out == ""
    )
    assert any(word in found.err for word in words.split("|")), found.err


def test_evaluate_unreadable_image(place: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    found = cli("evaluate", place / "weights.safetensors", "--data", tmp_path)
    assert found.code == 2 and "broken.png" in found.err


def test_models_by_name(tmp_path: Path, cli) -> None:
    """`timm:NAME` without a file or data: synthesised images, which are kept, a warning, and a model."""
    options = ("--calib-samples", "8", "--work-dir", tmp_path / "work", "--no-check", *FAST)
    found = cli("compile", ARCH, "--out", tmp_path / "m.onnx", *options)
    assert found.code == 0 and found.err.count("repquant-fx: warning:") == 1
    assert "no calibration data" in found.err and "8 images of dead leaves" in found.err and "W4A4" in found.err
    assert len(list((tmp_path / "work").glob("*/inputs.safetensors"))) == 1


def test_the_fixture_model_is_what_the_encoder_is(place: Path) -> None:
    program = torch.export.load(place / "model.pt2")
    x = sequences(3, seed=8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), redraw(Encoder())(x))
