"""Write codes of up to 4 bits in the types UINT4 and INT4 alone (`container: int4`).

The form that tool chains of accelerators read: `QuantizeLinear -> DequantizeLinear` on UINT4 activations and INT4
weights, with neither the Min that saturates codes in a byte nor the Cast that unpacks weights. ONNX Runtime's CPU
computes it in float, so it is no default. Below 4 bits a float Min saturates instead. Values are those of the byte-wide
form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from repquant_fx.naming import HIGHEST, SCALE, ZERO_POINT_INT4, ZERO_POINT_UINT4, onnx_node

TOP = 15


def narrow_codes(model: ir.Model) -> int:
    """Edit `model` in place, after `pack_weights`; returns how many quantizers and weights it narrowed."""
    graph, narrowed = model.graph, 0
    for node in list(graph):
        if node.op_type == "Min":
            narrowed += _narrow_activation(graph, node)
        elif node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT4:
            narrowed += _narrow_weight(graph, node)
    return narrowed


def _narrow_activation(graph: ir.Graph, saturate: ir.Node) -> bool:
    """QuantizeLinear -> Min -> DequantizeLinear becomes a UINT4 pair."""
    codes, top = saturate.inputs[0], _array(saturate.inputs[1])
    quantize = codes.producer() if codes is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear" or top is None or int(top) > TOP:
        return False
    value, scale, zero_point = quantize.inputs[0], _array(quantize.inputs[1]), _array(quantize.inputs[2])
    readers = [use.node for use in saturate.outputs[0].uses()]
    if (
        scale is None
        or zero_point is None
        or value is None
        or any(reader.op_type != "DequantizeLinear" for reader in readers)
    ):
        return False
    if int(top) < TOP:
        if scale.size > 1:
            return False  # one bound for all channels would not do
        # the highest code's own value: what rounds up to it does so still. No Clip: ONNX Runtime's fusion of it fails
        # on UINT4.
        high = np.float32((int(top) - float(zero_point)) * float(scale))
        bounded = ir.Node("", "Min", [value, _constant(graph, HIGHEST.of(str(quantize.name)), ir.tensor(high))])
        bounded.name = bounded.outputs[0].name = onnx_node(str(quantize.name), bounded.op_type)
        bounded.outputs[0].dtype, bounded.outputs[0].shape = ir.DataType.FLOAT, value.shape
        graph.insert_before(quantize, bounded)
        quantize.replace_input_with(0, bounded.outputs[0])
    narrow = _constant(graph, ZERO_POINT_UINT4.of(_stem(quantize)), _four_bit(zero_point, signed=False))
    quantize.replace_input_with(2, narrow)
    result, name = quantize.outputs[0], saturate.outputs[0].name
    for reader in readers:
        reader.replace_input_with(0, result)
        reader.replace_input_with(2, narrow)
    graph.remove(saturate, safe=True)
    result.name, result.dtype = name, ir.DataType.UINT4
    return True


def _narrow_weight(graph: ir.Graph, cast: ir.Node) -> bool:
    """INT4 -> Cast -> DequantizeLinear loses the Cast, and the zero point where it is 0."""
    readers = [use.node for use in cast.outputs[0].uses()]
    zero_points = [_array(reader.inputs[2]) if len(reader.inputs) > 2 else None for reader in readers]
    if any(reader.op_type != "DequantizeLinear" for reader in readers) or any(
        z is not None and (abs(z + 0.5) > 8).any() for z in zero_points
    ):
        return False
    for reader, zero_point in zip(readers, zero_points):
        reader.replace_input_with(0, cast.inputs[0])
        if zero_point is None:
            continue
        if zero_point.any():
            reader.replace_input_with(
                2, _constant(graph, ZERO_POINT_INT4.of(_stem(reader)), _four_bit(zero_point, signed=True))
            )
        else:
            reader.resize_inputs(2)
    graph.remove(cast, safe=True)
    return True


def _four_bit(values: np.ndarray, signed: bool) -> ir.Tensor:
    import ml_dtypes

    return ir.Tensor(values.astype(np.int8).astype(ml_dtypes.int4 if signed else ml_dtypes.uint4),
                     dtype=ir.DataType.INT4 if signed else ir.DataType.UINT4, shape=ir.Shape(values.shape))


def _constant(graph: ir.Graph, name: str, tensor: Any) -> ir.Value:
    if name not in graph.initializers:
        tensor.name = name
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _stem(node: ir.Node) -> str:
    scale = node.inputs[1]
    return (SCALE.stem(str(scale.name)) if scale is not None else None) or str(node.name)
