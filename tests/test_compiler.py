"""The Python API: what it takes, what it gives, what it refuses."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import PLAIN, compiled, inputs
from helpers import Encoder, images, output, redraw, sequences, vit
from torch import Tensor, nn

import repquant_fx
from repquant_fx import CompiledModel, InputError, LayerRule, ParityError, Recipe, compile
from repquant_fx import compiler as compiler_module
from repquant_fx.errors import CalibrationError, CaptureError, ModelFileError, OutputError, RepQuantWarning
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.parity import sqnr
from repquant_fx.report import summary
from repquant_fx.runtime import session

FAST = Recipe(wbits=8, abits=8, **PLAIN)


def encoder(**options: Any) -> nn.Module:
    return redraw(Encoder(**options))


def fast(model: Any, recipe: Recipe = FAST, **options: Any) -> CompiledModel:
    """The quickest compilation of an encoder."""
    settings: dict[str, Any] = {"calibration": sequences(16), "batch_size": 8, "example_inputs": (sequences(2),)}
    return compile(model, recipe=recipe, **{**settings, **options})


def program(dynamic: bool = True) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    return torch.export.export(encoder(), (sequences(2 if dynamic else 4),), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def of_module() -> CompiledModel:
    return fast(encoder())


def test_a_fixed_batch_is_run_whole() -> None:
    """Of 8 samples, of which a graph with a free batch would be run 4 at a time."""
    x = images(8)
    compiled = fast(torch.export.export(vit(1), (x,)), calibration=x, example_inputs=None)
    assert all(entry["sqnr_db"] is not None for entry in compiled.report["layers"])


def test_a_program_and_a_file_give_what_the_module_gives(of_module: CompiledModel, tmp_path: Path) -> None:
    x = sequences(5, seed=9)
    torch.export.save(program(), tmp_path / "m.pt2")
    expected = of_module.session(1).run(None, {"x": x.numpy()})[0]
    for source in (program(), tmp_path / "m.pt2"):
        result = fast(source, example_inputs=None)
        assert np.allclose(result.session(1).run(None, {"x": x.numpy()})[0], expected, atol=1e-5)
        assert [e["path"] for e in result.report["layers"]] == [e["path"] for e in of_module.report["layers"]]
        assert result.report["source"] != of_module.report["source"]


def test_a_program_with_a_static_batch(tmp_path: Path) -> None:
    result = fast(program(dynamic=False), example_inputs=None)
    assert result.report["capture"]["dynamic_batch"] is False
    assert result.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert result.session(1).run(None, {"x": sequences(4).numpy()})[0].shape == (4, 4)


def test_close_to_the_model_at_eight_bits() -> None:
    x = sequences(64, seed=11)
    result = fast(encoder(), calibration=sequences(256), batch_size=64, check=False)
    found = torch.from_numpy(result.session(1).run(None, {"x": x.numpy()})[0])
    assert sqnr(found, output(encoder(), x)) > 28


def test_the_caller_model_is_unchanged() -> None:
    model = encoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast(model, Recipe(wbits=4, abits=4, **PLAIN))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()) and len(after) == len(before)


def test_more_than_one_output_and_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(6, 3)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(left), self.b(right) + self.a(left).mean()

    data = (torch.randn(16, 8), torch.randn(16, 6))
    result = compile(redraw(Two()), recipe=FAST, calibration=[data], example_inputs=(data[0][:2], data[1][:2]))
    assert [i.name for i in result.proto.graph.input] == ["left", "right"]
    assert [o.name for o in result.proto.graph.output] == ["output_0", "output_1"]
    assert result.parity is not None and result.parity.problems() == []


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_of_each_layer() -> None:
    result = compiled("vit", 4, method="repquant")
    report = result.report
    assert json.loads(result.report_json()) == report and result.report_json().endswith("}\n")
    assert [e["path"] for e in report["layers"]][:6] == [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn",
        "blocks.0.attn",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
    ]
    layers = {e["node"]: e for e in report["layers"]}
    assert len(layers) == len(report["layers"]) == 14
    for entry in layers.values():
        assert entry["inputs"] and math.isfinite(entry["sqnr_db"]) and entry["sqnr_db"] > 0
        for item in entry["inputs"]:
            assert item["bits"] == (8 if entry["path"] == "patch_embed.proj" else 4) and item["scale"] > 0
            if item["quantizer"] == "uniform":
                assert 0 <= item["zero_point"] < 1 << item["bits"]
            else:
                assert item["name"].endswith("probabilities") and item["zero_code"] == 15
        if entry["operator"] == "linear":
            weight = entry["weight"]
            assert (
                weight["bits"] == 4
                and weight["method"] == "GPTQ"
                and 0 < weight["scale"]["min"] <= weight["scale"]["max"]
            )
            assert 0 < weight["output_error"]["chosen"] <= weight["output_error"]["round_to_nearest"] * 1.0001
    norms = [e for e in report["layers"] if e["group"] == "norm_linear"]
    assert {e["path"] for e in norms} == {*(f"blocks.{i}.{p}" for i in (0, 1) for p in ("attn.qkv", "mlp.fc1")), "head"}
    assert all("rewritten" in note for e in norms for note in e["rewritten"]) and all(e["rewritten"] for e in norms)


def test_report_of_the_whole() -> None:
    result = compiled("vit", 4, method="repquant")
    report = result.report
    assert (
        report["repquant_fx"] == repquant_fx.__version__
        and report["bits"] == "W4A4"
        and report["source"] == "VisionTransformer in memory"
    )
    assert report["calibration"] == {
        "origin": "tensors given by the caller",
        "samples": 18,
        "held_back": 6,
        "synthetic": False,
        "seed": 0,
    }
    assert report["capture"]["difference_from_eager"] < 1e-5 and report["capture"]["dynamic_batch"] is True
    assert report["file_bytes"] == len(result.to_bytes()) and report["left_alone"] == []
    assert report["output_sqnr_db"] > 10 and report["segments"] > 1 and report["node_executions"] > 0
    assert set(report["parity"]["quantizers"]) == {i["name"] for e in report["layers"] for i in e["inputs"]}
    text = summary(report)
    assert "quantized 10 weighted layers and 4 products (W4A4)" in text and "6 held-back samples" in text
    assert "checked in ONNX Runtime at each of 18 quantizers on equal inputs: 0 codes differ" in text


def test_what_is_left_alone_is_reported() -> None:
    report = compiled("small_swin", 4).report
    assert report["left_alone"] and {"path", "operator", "reason", "by"} == set(report["left_alone"][0])
    assert "left alone: layer_norm at patch_embed.norm" in summary(report)


def test_the_reported_scales_are_those_of_the_file() -> None:
    result = compiled("vit", 4)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.proto.graph.initializer}
    items = [i for e in result.report["layers"] for i in e["inputs"]]
    assert len(items) == 18
    for item in items:
        name = item["name"].replace("/", ".")
        assert float(stored[f"{name}_scale"]) == pytest.approx(item["scale"], rel=1e-6)
        if "zero_point" in item:
            assert int(stored[f"{name}_zero_point"]) == item["zero_point"]
    layer = next(e for e in result.report["layers"] if e["path"] == "blocks.0.mlp.fc1")
    scales = stored["blocks.0.mlp.fc1.weight_scale"]
    assert layer["weight"]["scale"] == {"min": float(scales.min()), "max": float(scales.max()), "count": len(scales)}


# ---- switches --------------------------------------------------------------------------------------------------------


def test_layer_rules_reach_the_file() -> None:
    recipe = Recipe(
        wbits=4, abits=4, layers=(LayerRule("head", wbits=8, abits=8), LayerRule("*.fc2", skip=True)), **PLAIN
    )
    result = fast(encoder(), recipe)
    layers = {e["path"]: e for e in result.report["layers"]}
    assert "blocks.blocks.0.fc2" not in layers and "blocks.0.fc2" not in layers
    assert layers["head"]["weight"]["bits"] == 8 and layers["head"]["inputs"][0]["bits"] == 8
    assert layers["blocks.0.fc1"]["weight"]["bits"] == 4
    kinds = {t.name: t.data_type for t in result.proto.graph.initializer}
    assert (
        kinds["head.weight_quantized"] == onnx.TensorProto.INT8
        and kinds["blocks.0.fc1.weight_quantized"] == onnx.TensorProto.INT4
    )
    assert not any("fc2" in name and "quantized" in name for name in kinds)
    producers = {o: n for n in result.proto.graph.node for o in n.output}
    product = next(
        n for n in result.proto.graph.node if n.op_type in ("MatMul", "Gemm") and n.name.startswith("blocks.0.fc2/")
    )
    source = producers[product.input[0]]
    source = producers[source.input[0]] if source.op_type == "Reshape" else source
    assert source.op_type == "Gelu", "a skipped layer reads its input as it is"


def test_no_check() -> None:
    result = fast(encoder(), check=False)
    assert result.parity is None and result.report["parity"] is None
    onnx.checker.check_model(result.proto, full_check=True)


class Stop(Exception):
    """Ends a compilation where its calibration data is known."""


def calibrated_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """What the quantizers get to see."""
    seen: list[Tensor] = []

    def watch(graph_module: object, plan: object, batches: list[tuple[Tensor, ...]], *rest: object) -> None:
        seen.extend(b[0] for b in batches)
        raise Stop

    monkeypatch.setattr(compiler_module, "quantize_sequentially", watch)
    with pytest.raises(Stop):
        fast(encoder(), **options)
    return torch.cat(seen)


def test_the_seed_chooses_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sequences(64)
    first, same, other = (calibrated_with(monkeypatch, calibration=data, samples=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and len(first) == len(other) == 12


@pytest.mark.parametrize("count, used", [(40, 30), (100, 84), (2, 1), (1, 1)])
def test_samples_held_back(count: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter, 16 at most, takes no part in calibration; a single sample has to serve for both."""
    data = sequences(count)
    calibrated = calibrated_with(monkeypatch, calibration=data)
    rows = {tuple(row.flatten().tolist()) for row in calibrated}
    assert len(rows) == len(calibrated) == used and rows <= {tuple(row.flatten().tolist()) for row in data}


def test_without_data_the_user_is_told() -> None:
    with pytest.warns(RepQuantWarning, match="no calibration data"):
        report = fast(encoder(), calibration=None, samples=16, check=False).report
    assert report["calibration"]["synthetic"] is True


def test_a_program_brings_its_own_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepQuantWarning)
        report = fast(program(), calibration=None, example_inputs=None, check=False).report
    assert report["calibration"]["origin"] == "example inputs stored in the model file"


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_save(of_module: CompiledModel, tmp_path: Path) -> None:
    path = of_module.save(tmp_path / "m.onnx", report=tmp_path / "r.json")
    assert (
        path.read_bytes() == of_module.to_bytes() and json.loads((tmp_path / "r.json").read_text()) == of_module.report
    )
    onnx.checker.check_model(str(path), full_check=True)
    x = sequences(3)
    assert np.array_equal(
        session(path, threads=1).run(None, {"x": x.numpy()})[0], of_module.session(1).run(None, {"x": x.numpy()})[0]
    )
    with pytest.raises(OutputError, match="--force"):
        of_module.save(path)
    of_module.save(str(path), force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r.json"]


def test_save_writes_nothing_where_one_file_cannot_be_written(of_module: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        of_module.save(tmp_path / "m.onnx", report=tmp_path / "no" / "r.json")
    with pytest.raises(OutputError):
        of_module.save(tmp_path / "no" / "m.onnx", report=tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_sessions_of_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelFileError, match=r"bad\.onnx is not an ONNX model"):
        session(tmp_path / "bad.onnx")


# ---- refusals --------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:  # the line that is named
            return self.fc(x)
        return -self.fc(x)


def not_finite(value: float) -> nn.Module:
    model = encoder()
    with torch.no_grad():
        model.get_parameter("blocks.0.fc1.weight")[2, 3] = value
    return model


def changed(x: Tensor, value: float) -> Tensor:
    x[1, 2, 3] = value
    return x


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: fast(nn.Sequential(nn.ReLU(), nn.LayerNorm(8))), InputError, "nothing to quantize"),
        (lambda: fast(encoder(), Recipe(layers=(LayerRule("*", skip=True),))), InputError, "nothing to quantize"),
        (lambda: fast(Branching()), CaptureError, r"test_compiler\.py:\d+: .*the line that is named"),
        (lambda: fast(not_finite(math.nan)), ModelFileError, r"blocks\.0\.fc1\.weight"),
        (lambda: fast(not_finite(math.inf)), ModelFileError, r"blocks\.0\.fc1\.weight"),
        (lambda: fast("nothing here"), ModelFileError, "not a model file"),
        (lambda: fast(42), InputError, "found int"),
        (lambda: fast(encoder(), example_inputs=None), InputError, "input"),
        (
            lambda: fast(encoder(), calibration=sequences(8, width=9)),
            CalibrationError,
            r"expects shape .*6, 8.*found .*6, 9",
        ),
        (lambda: fast(encoder(), calibration=sequences(8).long()), CalibrationError, "dtype float32, found int64"),
        (
            lambda: fast(encoder(), calibration=changed(sequences(8), math.nan)),
            CalibrationError,
            "NaN or infinite, in sample 1",
        ),
        (
            lambda: fast(encoder(), calibration=changed(sequences(8), -math.inf)),
            CalibrationError,
            "NaN or infinite, in sample 1",
        ),
        (lambda: fast(encoder(), calibration=sequences(8)[:0]), CalibrationError, "no samples"),
        (lambda: fast(encoder(), samples=0), CalibrationError, "samples must be at least 1"),
        (lambda: fast(encoder(), Recipe(wbits=9)), InputError, "wbits must be an integer from 2 to 8; found 9"),
    ],
    ids=range(15),
)
def test_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        make()
    assert isinstance(caught.value, InputError) and caught.value.exit_code == 2


def test_a_wrong_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that gets one constant wrong does not get past the check."""
    export = compiler_module.export_onnx

    def wrong(*args: Any, **options: Any) -> OnnxModel:
        model = export(*args, **options)
        tensor = next(t for t in model.proto.graph.initializer if t.name == "blocks.0.fc1.input_scale")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
        return model

    monkeypatch.setattr(compiler_module, "export_onnx", wrong)
    with pytest.raises(ParityError, match=r"blocks\.0\.fc1/input") as caught:
        fast(encoder())
    assert caught.value.exit_code == 3


def test_the_api_is_what_the_package_says() -> None:
    for name in repquant_fx.__all__:
        assert getattr(repquant_fx, name) is not None
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = repquant_fx.no_such_thing


def test_images_of_a_timm_model_need_no_example() -> None:
    result = compile(vit(depth=1), recipe=FAST, calibration=images(8), check=False)
    assert result.session(1).run(None, {"x": inputs("vit", 2).numpy()})[0].shape == (2, 5)
