"""Replace the calls of our own functions by the standard operators that they consist of.

Not every runtime reads functions of other domains than its own: OpenVINO has no rule for them, and `onnx.reference`
stumbles over their attributes. The constants that a function computes from its attributes and its scale are computed
here, so that what remains of a Softmax is `LogSoftmax -> QuantizeLinear -> Min -> DequantizeLinear -> Exp ->
ThresholdedRelu`. Values keep their names; nodes are called after the call (`blocks.0.attn/Log2Softmax/Exp`). What is
lost is that Netron shows a Softmax and its quantizer as one node.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from repquant_fx.exporters import functions
from repquant_fx.naming import DEQUANTIZED, LOG_STEP, QUANTIZED, ROUNDED, SCALE, ZERO_POINT, Names


def inline_functions(model: ir.Model) -> int:
    """Edit `model` in place, whose calls have constant scales and their thresholds; returns how many there were."""
    graph = model.graph
    calls = [node for node in graph if node.domain == functions.DOMAIN]
    used = {str(value.name) for node in graph for value in node.outputs}
    names = Names({*used, *graph.initializers, *(str(value.name) for value in graph.inputs)})
    scales = dict.fromkeys(str(call.inputs[1].name) for call in calls if call.inputs[1] is not None)
    for call in calls:
        _Inlined(graph, call, names).replace()
    for name in scales:
        if not graph.initializers[name].uses():
            del graph.initializers[name]
    model.opset_imports.pop(functions.DOMAIN, None)
    model.functions.clear()
    return len(calls)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model without functions: ours are replaced as `inline_functions` does, those of others by ONNX's inliner."""
    if not proto.functions:
        return proto
    model = ir.from_proto(proto)
    calls = [node for node in model.graph if node.domain == functions.DOMAIN]
    if {node.op_type for node in calls} == {name for _, name, *_ in model.functions} and all(map(_constant, calls)):
        inline_functions(model)
        return ir.to_proto(model)
    return onnx.inliner.inline_local_functions(proto)


def _constant(call: ir.Node) -> bool:
    """Whether a call is one that the exporter wrote."""
    scale = call.inputs[1] if len(call.inputs) == 2 else None
    wanted = {"bits", "steps", "threshold"} | ({"axis"} if call.op_type == "Log2Softmax" else set())
    return scale is not None and scale.const_value is not None and wanted <= call.attributes.keys()


class _Inlined:
    """One call, and the chain of operators that takes its place."""

    def __init__(self, graph: ir.Graph, call: ir.Node, names: Names) -> None:
        self.graph, self.call, self.names = graph, call, names
        scale = call.inputs[1]
        assert scale is not None and scale.const_value is not None
        output = str(call.outputs[0].name)
        self.stem = SCALE.stem(str(scale.name)) or DEQUANTIZED.stem(output) or output
        self.bits = call.attributes["bits"].as_int()
        self.step, self.zero_point = functions.quantizer(
            float(scale.const_value.numpy()), self.bits, call.attributes["steps"].as_int())

    def replace(self) -> None:
        call, (logits, _) = self.call, self.call.inputs
        assert logits is not None
        step = self._constant(LOG_STEP.of(self.stem), self.step)
        zero_point = self._constant(ZERO_POINT.of(self.stem), self.zero_point)
        top = self._constant(f"{call.name}/Min.top", np.asarray(2**self.bits - 1, np.uint8))
        head = "LogSoftmax" if call.op_type == "Log2Softmax" else "Log"
        axis = [call.attributes["axis"]] if head == "LogSoftmax" else []
        log = self._node(head, [logits], ir.DataType.FLOAT, attributes=axis)
        rounded = self._node("QuantizeLinear", [log, step, zero_point], ir.DataType.UINT8, ROUNDED.of(self.stem))
        code = self._node("Min", [rounded, top], ir.DataType.UINT8, QUANTIZED.of(self.stem))
        level = self._node("DequantizeLinear", [code, step, zero_point], ir.DataType.FLOAT)
        value = self._node("Exp", [level], ir.DataType.FLOAT)
        threshold = ir.AttrFloat32("alpha", call.attributes["threshold"].as_float())
        given = call.outputs[0]
        name = str(given.name)
        given.name = None
        result = self._node("ThresholdedRelu", [value], ir.DataType.FLOAT, name, [threshold])
        given.replace_all_uses_with(result, replace_graph_outputs=True)
        result.name = name
        self.graph.remove(call, safe=True)

    def _node(self, op: str, inputs: list[ir.Value], dtype: ir.DataType, value: str | None = None,
              attributes: list[ir.Attr] | None = None) -> ir.Value:
        node = ir.Node("", op, inputs, attributes or [])
        node.name = f"{self.call.name}/{op}"
        output = node.outputs[0]
        output.name = self.names.unique(value or node.name)
        output.dtype, output.shape = dtype, self.call.outputs[0].shape
        self.graph.insert_before(self.call, node)
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=self.names.unique(name), const_value=ir.tensor(array), shape=ir.Shape(array.shape),
                         type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        assert value.const_value is not None
        value.const_value.name = value.name
        self.graph.register_initializer(value)
        return value
