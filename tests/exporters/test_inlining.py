"""Functions replaced by standard operators: the same values as ONNX's own inliner gives, under readable names."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from repquant_fx.exporters import functions
from repquant_fx.exporters.inlining import inline_functions
from repquant_fx.quantizers.logarithmic import snap
from repquant_fx.runtime import run, session


def call(name: str, bits: int, steps: int, scale: float) -> onnx.ModelProto:
    """One call, as the exporter writes it."""
    axis = {"axis": -1} if name == "Log2Softmax" else {}
    node = helper.make_node(name, ["x", "attn.probabilities_scale"], ["attn.probabilities_dequantized"],
                            f"attn/{name}", domain=functions.DOMAIN, bits=bits, steps=steps,
                            threshold=functions.threshold(scale, bits, steps), **axis)
    shape = [2, "tokens", 9]
    graph = helper.make_graph(
        [node], "main", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("attn.probabilities_dequantized", TensorProto.FLOAT, shape)],
        [helper.make_tensor("attn.probabilities_scale", TensorProto.FLOAT, [], [scale])])
    function = functions.log2_softmax() if axis else functions.log2_quantize()
    opsets = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)]
    return helper.make_model(graph, functions=[function], ir_version=10, opset_imports=opsets)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    assert inline_functions(model) == 1
    found = ir.to_proto(model)
    onnx.checker.check_model(found, full_check=True)
    return found


@pytest.mark.parametrize("name", ["Log2Softmax", "Log2Quantize"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_values_are_those_of_the_function(name: str, bits: int, steps: int) -> None:
    proto = call(name, bits, steps, snap(0.83, bits, steps))
    x = 4 * torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(bits))
    x[0, 0, 3] = torch.finfo(torch.float32).min  # a masked one
    if name == "Log2Quantize":
        x = torch.softmax(x, -1)
    (found,) = run(session(inlined(proto), threads=1), {"x": x})
    (expected,) = run(session(onnx.inliner.inline_local_functions(proto), threads=1), {"x": x})
    assert torch.equal(found, expected) and bool((found[0, 0, 3] == 0).all()) and len(found.unique()) > 2


def test_names_say_where_it_came_from() -> None:
    graph = inlined(call("Log2Softmax", 4, 2, snap(0.5, 4, 2))).graph
    operators = ["LogSoftmax", "QuantizeLinear", "Min", "DequantizeLinear", "Exp", "ThresholdedRelu"]
    assert [node.name for node in graph.node] == [f"attn/Log2Softmax/{each}" for each in operators]
    assert graph.node[2].output[0] == "attn.probabilities_quantized"
    assert graph.node[-1].output[0] == graph.output[0].name == "attn.probabilities_dequantized"
    names = {tensor.name for tensor in graph.initializer}
    assert names == {"attn.probabilities_log_step", "attn.probabilities_zero_point", "attn/Log2Softmax/Min.top"}


def test_nothing_to_inline() -> None:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) '
                                    "{ y = Exp(x) }")
    model = ir.from_proto(proto)
    assert inline_functions(model) == 0 and ir.to_proto(model).SerializeToString() == ir.to_proto(
        ir.from_proto(proto)).SerializeToString()
