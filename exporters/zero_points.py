"""Write the zero points of symmetric weights out.

ONNX takes an absent zero point for 0, but ONNX Runtime turns `DequantizeLinear -> Gemm` into an integer kernel only
where the weight's is written: without it every Linear runs in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from repquant_fx.naming import SCALE, ZERO_POINT, Names


def add_zero_points(model: ir.Model) -> int:
    """Give every DequantizeLinear of int8 constants that has no zero point one of zeros; returns how many."""
    graph, added = model.graph, 0
    names, zero_points = Names(graph.initializers), dict[ir.Value, ir.Value]()
    for node in graph:
        if node.op_type != "DequantizeLinear" or (len(node.inputs) > 2 and node.inputs[2] is not None):
            continue
        if "block_size" in node.attributes and node.attributes["block_size"].as_int():  # of weights alone
            continue
        codes, scale = node.inputs[0], node.inputs[1]
        if (
            codes is None
            or scale is None
            or scale.const_value is None
            or codes.const_value is None
            or codes.dtype != ir.DataType.INT8
        ):
            continue
        if scale not in zero_points:
            name = names.unique(ZERO_POINT.of(SCALE.stem(str(scale.name)) or str(scale.name)))
            zeros = ir.tensor(np.zeros(scale.const_value.numpy().shape, np.int8), name=name)
            zero_points[scale] = ir.Value(
                name=name, shape=zeros.shape, type=ir.TensorType(zeros.dtype), const_value=zeros
            )
            graph.register_initializer(zero_points[scale])
        node.resize_inputs(3)
        node.replace_input_with(2, zero_points[scale])
        added += 1
    return added
