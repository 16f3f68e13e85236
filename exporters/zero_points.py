"""Write the zero points of symmetric weights out.

ONNX takes an absent zero point for 0, but ONNX Runtime turns `DequantizeLinear -> Gemm` into an integer kernel only where the
weight's is written: without it every Linear runs in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def add_zero_points(model: ir.Model) -> int:
    """Give every DequantizeLinear of int8 constants that has no zero point one of zeros; returns how many."""
    graph, added = model.graph, 0
    for node in graph:
        if node.op_type != "DequantizeLinear" or (len(node.inputs) > 2 and node.inputs[2] is not None):
            continue
        codes, scale = node.inputs[0], node.inputs[1]
        if codes is None or scale is None or scale.const_value is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        name = f"{str(scale.name).removesuffix('_scale')}_zero_point"
        if name not in graph.initializers:
            zeros = ir.tensor(np.zeros(scale.const_value.numpy().shape, np.int8), name=name)
            graph.register_initializer(ir.Value(name=name, shape=zeros.shape, type=ir.TensorType(zeros.dtype), const_value=zeros))
        node.resize_inputs(3)
        node.replace_input_with(2, graph.initializers[name])
        added += 1
    return added
