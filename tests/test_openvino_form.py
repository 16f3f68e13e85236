"""The form of a file for OpenVINO: Linears on tokens, quantizers next to dequantizers, signed codes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from compiled import PLAIN
from torch import Tensor, nn

from repquant_fx import CompiledModel, Recipe, compile
from repquant_fx import report as reports
from repquant_fx.audit import audit, summary
from repquant_fx.inspection.file import inspect_file
from repquant_fx.recipe import fast
from repquant_fx.runtimes import version


class Block(nn.Module):
    """One block of a transformer: six products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@functools.cache
def made(symmetric: bool = True, softmax: str = "uniform") -> CompiledModel:
    generator = torch.manual_seed(0)
    x, recipe = torch.randn(24, 10, 32, generator=generator), Recipe(symmetric=symmetric, softmax=softmax, **PLAIN)
    return compile(nn.Sequential(Block()), x, recipe, example_inputs=[x[:2]], batch_size=8, target="openvino")


def zero_point_types(proto: onnx.ModelProto) -> dict[str, int]:
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return {node.name: types[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"}


def test_the_preset() -> None:
    assert fast(8, 8) == Recipe(symmetric=True, softmax="uniform")


def test_quantizers_stand_next_to_dequantizers() -> None:
    graph = made().proto.graph
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers and all(set(readers[node.output[0]]) == {"DequantizeLinear"} for node in quantizers)


def test_codes_are_signed_but_for_one_sided_values() -> None:
    unsigned = {name for name, kind in zero_point_types(made().proto).items() if kind == onnx.TensorProto.UINT8}
    assert len(unsigned) == 2 and any("fc2" in name for name in unsigned), unsigned  # GELU and probabilities
    free = list(zero_point_types(made(symmetric=False, softmax="log").proto).values())
    assert free.count(onnx.TensorProto.UINT8) > 4  # some may lie in the middle all the same


def test_it_computes_the_codes_of_the_reference_in_both_runtimes() -> None:
    for result in (made(), made(symmetric=False, softmax="log")):
        found: Any = result.report["runtime"]
        assert result.parity is not None and result.parity.problems() == []
        if version("openvino") is not None:
            assert found["parity"]["agrees"] and found["parity"]["output_step"] < 1e-5


def test_openvino_multiplies_all_of_it_as_integers() -> None:
    if version("openvino") is None:
        pytest.skip("openvino is not installed")
    products = audit(made().proto, "openvino")
    assert len(products) == 6 and all(product.integer for product in products), summary(products, "openvino")
    lost = [product for product in audit(made(symmetric=False, softmax="log").proto, "openvino") if not product.integer]
    assert {product.op for product in lost} == {"MatMul"} and len(lost) == 2
    assert {"logarithmic" in product.reason for product in lost} == {True, False}
    assert sum("zero point" in product.reason for product in lost) == 1


def test_the_report_and_inspect_ask_openvino(tmp_path: Path) -> None:
    if version("openvino") is None:
        pytest.skip("openvino is not installed")
    path = made().save(tmp_path / "model.onnx", report=tmp_path / "report.json")
    assert "6 of 6 quantized products run as integer kernels under OpenVINO" in reports.summary(made().report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["runtime"]["kernels"]
    inspection = inspect_file(path)
    assert inspection.about["audited_in"] == "OpenVINO" and all(row.integer for row in inspection.rows)
    signed = [row for row in inspection.rows if row.zero_point == 0 and row.bits == 8]
    assert len(signed) == 7
