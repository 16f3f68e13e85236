"""What a target or an opset does not take is an error that names the node."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx import parser

from repquant_fx.exporters.conformance import ConformanceError, check_conformance, to_opset
from repquant_fx.targets import find


def model(body: str, inputs: str = "float[2, 4] x", output: str = "float[2, 4] y", **names: str) -> onnx.ModelProto:
    """A model of opset 21; its nodes are called after their operators."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({output}) {{ {body} }}')
    for node in proto.graph.node:
        node.name = f"blocks.0/{node.op_type}"
    return proto


QUANTIZED = """
    s = Constant <value = float {0.5}> ()
    z = Constant <value = uint8 {3}> ()
    q = QuantizeLinear <block_size = 0, output_dtype = 0> (x, s, z)
    y = DequantizeLinear (q, s, z)
"""
FOUR_BITS = """
    s = Constant <value = float {0.5}> ()
    z = Constant <value = uint8 {3}> ()
    n = Cast <to = 21> (z)
    q = QuantizeLinear (x, s, n)
    y = DequantizeLinear (q, s, n)
"""


@pytest.mark.parametrize("opset, ir_version", [(17, 8), (19, 9), (21, 10), (23, 11), (27, 13)])
def test_a_file_is_written_in_another_opset(opset: int, ir_version: int) -> None:
    proto = model(QUANTIZED)
    to_opset(proto, opset)
    assert proto.opset_import[0].version == opset and proto.ir_version == ir_version
    onnx.checker.check_model(proto, full_check=True)
    check_conformance(proto, find("onnx", opset))


@pytest.mark.parametrize("body, opset, words", [
    ("y = Gelu (x)", 19, r"'blocks.0/Gelu' \(Gelu\) does not exist in opset 19; it came with opset 20"),
    ("a = Constant <value_ints = [1]> ()  y = ReduceMax <keepdims = 1> (x, a)", 17, "another operator in opset 17"),
    (QUANTIZED.replace("block_size = 0", "axis = 0, block_size = 2"), 20, "no attribute block_size in opset 20"),
])
def test_what_another_opset_lacks(body: str, opset: int, words: str) -> None:
    with pytest.raises(ConformanceError, match=words):
        to_opset(model(body), opset)


def test_types_of_four_bits_need_opset_21() -> None:
    proto = model(FOUR_BITS)
    check_conformance(proto, find("onnx"))
    to_opset(proto, 20)
    with pytest.raises(ConformanceError, match=r"'blocks.0/Cast' \(Cast\) takes no tensor\(uint4\) in opset 20; "
                                               "opset 21 brought it"):
        check_conformance(proto, find("onnx", 20))


def test_openvino_computes_something_else_with_uint4() -> None:
    with pytest.raises(ConformanceError, match=r"'blocks.0/Cast' \(Cast\) works on UINT4, which the target openvino"):
        check_conformance(model(FOUR_BITS), find("openvino"))


def test_operators_outside_of_a_targets_list() -> None:
    target = replace(find("onnx"), operators=frozenset({"Exp"}))
    check_conformance(model("y = Exp (x)"), target)
    with pytest.raises(ConformanceError, match=r"'blocks.0/Gelu' \(Gelu\): the target onnx does not take"):
        check_conformance(model("y = Gelu (x)"), target)


def test_other_domains_are_no_standard() -> None:
    proto = model("y = Exp (x)")
    proto.graph.node[0].domain = "repquant_fx"
    check_conformance(proto, find())
    with pytest.raises(ConformanceError, match="standard operators only"):
        check_conformance(proto, find("openvino"))
