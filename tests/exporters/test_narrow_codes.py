"""The UINT4/INT4 form: every narrow code in a narrow type, and the values of the byte-wide form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from compiled import compiled, inputs
from helpers import vit
from onnx import TensorProto

from repquant_fx import CompiledModel, Recipe, audit, session
from repquant_fx.cli import main
from repquant_fx.parity import compare
from repquant_fx.passes.operators import DEQUANTIZE, QUANTIZE


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element types of all values that have one."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    known = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.input]}
    return {**known, **{t.name: t.data_type for t in proto.graph.initializer}}


def run(result: CompiledModel, name: str) -> np.ndarray:
    found: np.ndarray = result.session(threads=1).run(None, {"x": inputs(name, 8, seed=5).numpy()})[0]
    return found


@pytest.mark.parametrize("name, bits", [
    ("vit", 3), ("small_swin", 4), pytest.param("vit", 4, marks=pytest.mark.slow),
    pytest.param("small_swin", 2, marks=pytest.mark.slow),
])
def test_same_values_in_narrow_types(name: str, bits: int) -> None:
    wide, narrow = compiled(name, bits), compiled(name, bits, container="int4")
    assert narrow.parity is not None and not narrow.parity.problems()  # code for code, at every quantizer
    onnx.checker.check_model(narrow.proto, full_check=True)
    kinds = types(narrow.proto)
    operators = {(n.op_type, kinds.get(n.input[0])) for n in narrow.proto.graph.node}
    assert not operators & {("Min", TensorProto.UINT8), ("Cast", TensorProto.INT4)}
    quantizers = [n for n in narrow.proto.graph.node if n.op_type == "QuantizeLinear"]
    four_bit = [n for n in quantizers if kinds[n.input[2]] == TensorProto.UINT4]
    eight_bit = {n.output[0] for n in quantizers} - {n.output[0] for n in four_bit}
    assert len(eight_bit) == 1 and len(four_bit) > 8  # the image stays at 8 bits
    for node in narrow.proto.graph.node:
        if node.op_type == "DequantizeLinear" and not kinds[node.input[0]] == TensorProto.INT32:
            assert node.input[0] in eight_bit or kinds[node.input[0]] in (TensorProto.UINT4, TensorProto.INT4), (
                node.name
            )
    if bits == 4:  # with fewer, a tie decides about the whole model: the parity check above is what says they agree
        a, b = run(wide, name), run(narrow, name)
        assert float(np.square(a - b).sum() / np.square(a).sum()) < 0.05
    assert narrow.report["file_bytes"] < 1.05 * wide.report["file_bytes"]


def test_saturation_below_four_bits() -> None:
    """Codes stop at the top of their bits, not of the type: checked on inputs far beyond the calibrated range."""
    result = compiled("vit", 3, container="int4")
    x = 50 * inputs("vit", 4)
    assert not compare(result.graph_module, result.proto, result.quantizers, [x], ["x"]).problems()


def test_quantize_and_dequantize_stand_together() -> None:
    result = compiled("vit", 4, container="int4")
    for node in result.graph_module.graph.find_nodes(op="call_function", target=QUANTIZE):
        assert {user.target for user in node.users} == {DEQUANTIZE}


def test_eight_bits_need_no_narrow_type() -> None:
    wide, other = compiled("vit", 8), compiled("vit", 8, container="int4")
    assert np.array_equal(run(wide, "vit"), run(other, "vit")) or abs(run(wide, "vit") - run(other, "vit")).max() < 0.1
    assert not {TensorProto.UINT4, TensorProto.INT4} & set(types(other.proto).values())


def test_standard_operators_alone() -> None:
    """With a uniform Softmax grid the file is plain QDQ: no function of our own."""
    result = compiled("vit", 4, container="int4", softmax="uniform")
    assert not result.proto.functions and {n.domain for n in result.proto.graph.node} == {""}


def test_audit_names_the_reason() -> None:
    products = audit.audit(compiled("vit", 4, container="int4").proto)
    assert products and not any(p.integer for p in products if p.op == "Gemm" and "patch_embed" not in p.path)
    assert any("UINT4" in p.reason for p in products)


def test_recipe_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "model.pt2", tmp_path / "narrow.onnx"
    torch.export.save(
        torch.export.export(vit(depth=1), (inputs("vit", 2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)),
        source,
    )
    switches = ["--wbits", "4", "--abits", "4", "--container", "int4", "--no-gptq", "--no-correction", "--json"]
    assert main(["compile", str(source), "--out", str(out), *switches]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["container"] == Recipe.from_file(out).container == "int4"
    session(out)
