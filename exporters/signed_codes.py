"""Write codes whose zero point is the middle of the range as signed integers, which have none.

OpenVINO multiplies two activations as integers only where neither has a zero point, and its products with weights are
faster without one. `QuantizeLinear -> DequantizeLinear` on uint8 with the zero point 128 becomes the same on int8 with
the zero point 0: each code is 128 less, the values are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from repquant_fx.naming import SCALE, ZERO_POINT_INT8

MIDDLE = 128


def sign_codes(model: ir.Model) -> int:
    """Edit `model` in place; returns how many quantizers it changed. Left as they are: codes that anything but
    dequantizers reads.
    """
    graph, changed = model.graph, 0
    for node in graph:
        if node.op_type != "QuantizeLinear" or not _in_the_middle(node):
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if node.outputs[0].is_graph_output() or not readers or not all(
            reader.op_type == "DequantizeLinear" and _in_the_middle(reader) for reader in readers
        ):
            continue
        zero = _zero(graph, node)
        for each in (node, *readers):
            each.replace_input_with(2, zero)
        node.outputs[0].dtype = ir.DataType.INT8
        changed += 1
    return changed


def _in_the_middle(node: ir.Node) -> bool:
    """Whether its zero point is the middle code, of the whole tensor."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    constant = zero_point.const_value if zero_point is not None else None
    return constant is not None and constant.dtype == ir.DataType.UINT8 and constant.numpy().shape == () and (
        int(constant.numpy()) == MIDDLE)


def _zero(graph: ir.Graph, node: ir.Node) -> ir.Value:
    scale = node.inputs[1]
    assert scale is not None
    name = ZERO_POINT_INT8.of(SCALE.stem(str(scale.name)) or str(node.name))
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(0, np.int8), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    return graph.initializers[name]
