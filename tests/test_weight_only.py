"""Weights quantized alone: what the graph, the file, ONNX Runtime and the commands make of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import PLAIN
from helpers import redraw
from torch import nn

from repquant_fx import CompiledModel, InputError, LayerRule, Recipe, compile
from repquant_fx.audit import audit, summary
from repquant_fx.errors import RecipeError
from repquant_fx.sensitivity import sensitivity

X = torch.randn(24, 6, 40, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A norm that two layers read, attention without heads, a residual: 40 inputs make 2 groups of 32, one short."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.v = nn.LayerNorm(40), nn.Linear(40, 24), nn.Linear(40, 24, bias=False)
        self.out = nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        query, value = self.q(y), self.v(y)
        return x + self.out(torch.softmax(query @ query.transpose(1, 2), -1) @ value)


@functools.cache
def compiled(wbits: int = 4, group_size: int = 32, method: str = "plain", **changes: Any) -> CompiledModel:
    settings = {**(PLAIN if method == "plain" else {}), "wbits": wbits, "abits": "none", "group_size": group_size}
    return compile(redraw(Block()), X, Recipe(**{**settings, **changes}), example_inputs=(X[:2],))


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("wbits, group_size", [(4, 32), (4, 0), (8, 32), (8, 0), (3, 16)])
def test_onnx_runtime_multiplies_by_the_codes(wbits: int, group_size: int) -> None:
    model = compiled(wbits, group_size)
    assert "QuantizeLinear" not in operators(model.proto) and "Cast" not in operators(model.proto)
    assert [product.kernel for product in audit(model.proto)] == ["MatMulNBits"] * 3
    assert "3 of 3 products with weights alone" in summary(audit(model.proto))
    parity = model.report["parity"]
    assert parity["agrees"] and parity["output_step"] < 1e-5 and not parity["quantizers"]
    blocks = {a.i for node in model.proto.graph.node for a in node.attribute if a.name == "block_size"}
    assert blocks == {group_size}


def test_the_file_holds_packed_codes_and_zero_points() -> None:
    tensors = {t.name: t for t in compiled().proto.graph.initializer}
    codes, zero = tensors["q.weight_quantized"], tensors["q.weight_zero_point"]
    assert codes.data_type == zero.data_type == onnx.TensorProto.INT4
    assert list(codes.dims) == [40, 24] and list(zero.dims) == [2, 24] and len(codes.raw_data) == 40 * 24 // 2
    scale = onnx.numpy_helper.to_array(tensors["q.weight_scale"])
    weight = redraw(Block()).q.weight.detach().numpy().T
    values = onnx.numpy_helper.to_array(codes).astype(np.float32), onnx.numpy_helper.to_array(zero).astype(np.float32)
    step = np.repeat(scale, 32, 0)[:40]
    found = (values[0] - np.repeat(values[1], 32, 0)[:40]) * step
    assert float(np.abs(found - weight).max() / step.max()) <= 1.0


def test_accuracy_levels() -> None:
    """1 multiplies activations as they are; 4, which ONNX Runtime takes by itself, rounds them first."""
    x, model = X[:4].numpy(), compiled()
    (exact,), (quick,) = (model.session(1, level).run(None, {"x": x}) for level in (1, 4))
    expected = model.graph_module(X[:4])
    expected = expected[0] if isinstance(expected, (tuple, list)) else expected
    apart = [float(np.abs(found - expected.detach().numpy()).max()) for found in (exact, quick)]
    assert apart[0] < 1e-5 < 1e-3 < apart[1]


def test_gptq_and_the_correction_lose_less() -> None:
    plain, chosen = compiled(3, 16), compiled(3, 16, "repquant")
    assert chosen.report["output_sqnr_db"] > plain.report["output_sqnr_db"] + 1
    entry = chosen.report["layers"][0]
    assert entry["weight"]["method"] == "GPTQ" and entry["weight"]["granularity"].endswith("16 inputs")
    assert entry["weight"]["zero_point"] == "one for each scale" and entry["inputs"][0]["quantizer"] == "none"


def test_groups_lose_less_than_channels() -> None:
    assert compiled(3, 16).report["output_sqnr_db"] > compiled(3, 0).report["output_sqnr_db"]


def test_layers_of_both_kinds() -> None:
    """A layer whose activations stay in float shares no scale with its neighbours."""
    rules = (LayerRule("v", abits="none"),)  # type: ignore[arg-type]
    recipe = Recipe(wbits=4, abits=8, group_size=32, **PLAIN, layers=rules)
    model = compile(redraw(Block()), X, recipe, example_inputs=(X[:2],))
    layers = {entry["path"]: entry for entry in model.report["layers"] if "weight" in entry}
    assert [layers[name]["inputs"][0]["bits"] for name in ("q", "v", "out")] == [8, 32, 8]
    assert layers["q"]["weight"]["granularity"] == "per output channel"
    assert model.report["parity"]["agrees"]
    kernels = {product.node: product.kernel for product in audit(model.proto)}
    assert kernels["v/MatMul"] == "MatMulNBits" and kernels["q/Gemm"] != "MatMulNBits"


@pytest.mark.parametrize("settings, words", [
    ({"group_size": 32}, "needs activations in float"), ({"abits": "none", "reconstruct": 5}, "reconstruct learns")])
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        compile(redraw(Block()), X, Recipe(**settings), example_inputs=(X[:2],))


def test_what_bits_do_needs_quantized_activations() -> None:
    with pytest.raises(InputError, match="give bits for abits"):
        sensitivity(redraw(Block()), X, Recipe(abits="none"), example_inputs=(X[:2],))  # type: ignore[arg-type]


def test_a_work_directory_gives_the_same_file(tmp_path: Path) -> None:
    def run() -> bytes:
        recipe = Recipe(wbits=4, abits="none", group_size=32)  # type: ignore[arg-type]
        made = compile(redraw(Block()), X, recipe, example_inputs=(X[:2],), work_dir=tmp_path, check=False)
        return made.to_bytes()

    first = run()
    assert list(tmp_path.rglob("*.safetensors")) and run() == first


@pytest.mark.parametrize("target", ["onnx", "ort-cpu-avx2"])
def test_other_targets(target: str) -> None:
    """Standard operators alone, checked in onnx.reference; eight bits stay eight without products of integers."""
    recipe = Recipe(wbits=8, abits="none", group_size=32, **PLAIN)
    made = compile(redraw(Block()), X, recipe, example_inputs=(X[:2],), target=target)
    assert made.report["bits"] == "W8A32g32" and made.report["recipe"]["abits"] == "none"
    if target == "onnx":
        assert made.report["runtime"]["parity"]["agrees"]


def test_an_opset_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="opset 19"):
        compile(redraw(Block()), X, Recipe(wbits=8, abits="none", group_size=32, **PLAIN),
                example_inputs=(X[:2],), opset=19)
