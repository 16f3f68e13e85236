"""The audit of a file: which products became integer kernels, told from ONNX Runtime's own optimized graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from compiled import compiled

from repquant_fx.audit import audit, summary
from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.operators import PRODUCTS


@pytest.mark.parametrize("name, bits", [
    ("vit", 8), ("swin", 4), pytest.param("vit", 4, marks=pytest.mark.slow),
    pytest.param("swin", 8, marks=pytest.mark.slow),
])
def test_every_linear_and_the_first_attention_product_run_with_integers(name: str, bits: int) -> None:
    proto = compiled(name, bits).proto
    products = audit(proto)
    quantized = [n for n in proto.graph.node if n.op_type in PRODUCTS]
    assert [p.node for p in products] == [n.name for n in quantized]
    assert all(p.integer for p in products if p.op == "Gemm")
    float_ones = [p for p in products if not p.integer]
    softmaxes = sum(n.op_type == "Log2Softmax" for n in proto.graph.node)
    assert len(float_ones) == softmaxes > 0 and all("logarithmic operand" in p.reason for p in float_ones)
    assert all(p.reason == "" for p in products if p.integer)
    assert summary(products).startswith(f"{len(products) - softmaxes} of {len(products)} ")


def test_a_lost_fusion_is_told() -> None:
    """Without the weights' zero points ONNX Runtime runs every Linear in float: the audit says so, and of which."""
    proto = onnx.ModelProto()
    proto.CopyFrom(compiled("vit", 8).proto)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and "weight" in node.input[0]:
            del node.input[2:]
    lost = [p for p in audit(proto) if p.op == "Gemm"]
    assert lost and not any(p.integer for p in lost)
    assert all("did not match the Q/DQ pattern and runs Gemm" in p.reason for p in lost)


def test_channelwise_scales_are_the_reason() -> None:
    products = audit(compiled("vit", 8, norm="channelwise").proto)
    behind_norms = [p for p in products if p.path.endswith(("attn.qkv", "mlp.fc1"))]
    assert behind_norms and not any(p.integer for p in behind_norms)


def test_paths_bytes_and_what_is_no_model(tmp_path: Path) -> None:
    result = compiled("vit", 8)
    path = result.save(tmp_path / "model.onnx")
    assert audit(path) == audit(path.read_bytes()) == audit(result.proto)
    with pytest.raises(ModelFileError):
        audit(b"not a model")
    with pytest.raises(ModelFileError):
        audit(tmp_path / "absent.onnx")
