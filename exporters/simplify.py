"""Clean-up of the exporter's raw graph: small constants folded, sizes static wherever ONNX can infer them. Q/DQ and
weights stay.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants


def simplify(model: ir.Model) -> None:
    """Edit `model` in place; what it computes is unchanged."""
    fold_constants(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_reshapes(model.graph)
    for each in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        each(model)


def infer_reshapes(graph: ir.Graph) -> int:
    """A Reshape to sizes of which one is computed infers that one (-1), so that its shape is a constant; returns how
    many.
    """
    changed = 0
    for node in graph:
        shape = node.inputs[1] if node.op_type == "Reshape" and node.domain == "" else None
        concat = shape.producer() if shape is not None else None
        if shape is None or concat is None or concat.op_type != "Concat":
            continue
        parts = [_constant(value) for value in concat.inputs]
        if sum(k is None for k in parts) != 1 or any(k is not None and (k <= 0).any() for k in parts):
            continue
        unknown = concat.inputs[[k is None for k in parts].index(True)]
        if unknown is None or not _single(unknown):
            continue
        sizes = np.concatenate([np.array([-1]) if k is None else k for k in parts]).astype(np.int64)
        name = f"val_shape_{changed}"
        value = ir.Value(name=name, shape=ir.Shape(sizes.shape), type=ir.TensorType(ir.DataType.INT64),
                         const_value=ir.tensor(sizes, name=name))
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        changed += 1
    return changed


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy().reshape(-1)


def _single(value: ir.Value) -> bool:
    """Whether a computed size is one number: a Reshape or Unsqueeze to one element."""
    if value.shape is not None:
        return list(value.shape) == [1]
    producer = value.producer()
    if producer is None or producer.op_type != "Reshape":
        return False
    target = _constant(producer.inputs[1])
    return target is not None and target.tolist() in ([1], [-1])
