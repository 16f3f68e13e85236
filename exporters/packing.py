"""Pack weights of up to 4 bits as INT4 initializers.

A plain INT4 operand does not fuse in ONNX Runtime; `INT4 initializer -> Cast(INT8) -> DequantizeLinear` does, because
the Cast is folded when the session is created. Data is raw and packed, two codes per byte.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from repquant_fx.naming import INT8, onnx_node

PACKED_BITS = 4


def pack_weights(model: ir.Model, names: set[str], alone: Collection[str] = ()) -> int:
    """Store the int8 initializers called `names` (codes within [-8, 7]) as INT4; returns how many.

    Args:
        alone: further ones, codes and zero points of weights alone, which are read as they are packed.
    """
    graph, packed = model.graph, 0
    for name in sorted(alone):
        value = graph.initializers.get(name)
        if value is not None and value.const_value is not None and value.dtype == ir.DataType.INT8:
            _store(value, value.const_value.numpy())
    for name in sorted(names):
        value = graph.initializers.get(name)
        if value is None or value.const_value is None or value.dtype != ir.DataType.INT8:
            continue
        codes = value.const_value.numpy()
        if codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
            continue
        users = list(value.uses())
        _store(value, codes)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.INT8))])
        cast.outputs[0].name = INT8.of(name)
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT8, ir.Shape(codes.shape)
        cast.metadata_props.update(users[0].node.metadata_props)
        cast.name = onnx_node(str(users[0].node.name), "unpack")
        graph.insert_before(users[0].node, cast)
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
        packed += 1
    return packed


def _store(value: ir.Value, codes: np.ndarray) -> None:
    value.const_value = ir.Tensor(_nibbles(codes), dtype=ir.DataType.INT4, shape=ir.Shape(codes.shape), name=value.name)
    value.dtype = ir.DataType.INT4


def _nibbles(codes: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return np.asarray(codes).astype(ml_dtypes.int4)
