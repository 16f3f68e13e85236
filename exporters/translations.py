"""How each operator of a lowered graph is written in ONNX (`repquant_fx.ops` lists the pairs)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import onnx
import torch
from onnxscript import DOUBLE, FLOAT, INT8, INT16, INT32, INT64, UINT8
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from repquant_fx.exporters.functions import DOMAIN, VERSION

AnyNumber = TypeVar("AnyNumber", bound=UINT8 | INT8 | INT16 | INT32 | INT64 | FLOAT | DOUBLE)
NARROW = {onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT16}


def _local(name: str, value: str, attributes: list[str]) -> Op:
    """An operator of our own domain, as the exporter's recorder knows operators: by a schema."""
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[onnx.defs.OpSchema.FormalParameter(n, "tensor(float)") for n in (value, "scale")],
        outputs=[onnx.defs.OpSchema.FormalParameter("output", "tensor(float)")],
        attributes=[
            *(onnx.defs.OpSchema.Attribute(a, onnx.defs.OpSchema.AttrType.INT, required=True) for a in attributes),
            onnx.defs.OpSchema.Attribute("threshold", onnx.defs.OpSchema.AttrType.FLOAT, required=True),
        ],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


LOG2_SOFTMAX = _local("Log2Softmax", "logits", ["axis", "bits", "steps"])
LOG2_QUANTIZE = _local("Log2Quantize", "values", ["bits", "steps"])


def quantize(x: Any, scale: Any, zero_point: Any, bits: int, axis: int) -> Any:
    """QuantizeLinear-21 to uint8. Below 8 bits the codes saturate by Min on the uint8 tensor, which keeps ONNX
    Runtime's fusions (a float Clip before it would not)."""
    codes = op.QuantizeLinear(x, scale, zero_point) if axis < 0 else op.QuantizeLinear(x, scale, zero_point, axis=axis)
    if bits == 8:
        return codes
    return op.Min(codes, op.Constant(value=onnx.helper.make_tensor("top", onnx.TensorProto.UINT8, [], [2**bits - 1])))


def dequantize(codes: Any, scale: Any, zero_point: Any, bits: int, axis: int, block: int = 0) -> Any:
    """DequantizeLinear-21."""
    inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    if block:
        return op.DequantizeLinear(*inputs, axis=axis, block_size=block)
    return op.DequantizeLinear(*inputs) if axis < 0 else op.DequantizeLinear(*inputs, axis=axis)


def log2_softmax(logits: Any, scale: Any, dim: int, bits: int, steps: int) -> Any:
    # see `functions.set_thresholds`
    return LOG2_SOFTMAX(logits, scale, axis=dim, bits=bits, steps=steps, threshold=0.0)


def log2_quantize(a: Any, scale: Any, bits: int, steps: int) -> Any:
    return LOG2_QUANTIZE(a, scale, bits=bits, steps=steps, threshold=0.0)


def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """In the one spelling that ONNX Runtime recognises and runs as one kernel (a division by the root, the weight
    last). Constants and weight take the dtype of x, which Add and Mul ask for.
    """
    dtype = onnx.TensorProto.FLOAT if x.dtype is None else x.dtype.value
    square = op.Pow(x, op.Constant(value=onnx.helper.make_tensor("two", onnx.TensorProto.FLOAT, [], [2.0])))
    axes = op.Constant(value_ints=list(range(-len(normalized_shape), 0)))
    smallest = float(torch.finfo(torch.float32).eps) if eps is None else eps
    mean = op.Add(
        op.ReduceMean(square, axes, keepdims=1),
        op.Constant(value=onnx.helper.make_tensor("eps", dtype, [], [smallest])),
    )
    normalized = op.Div(x, op.Sqrt(mean))
    if weight is None:
        return normalized
    return op.Mul(normalized, weight if weight.dtype in (None, x.dtype) else op.Cast(weight, to=dtype))


def einsum(equation: str, tensors: Sequence[AnyNumber], path: Any = None) -> Any:
    """Einsum-12; ONNX Runtime has none of narrow integers, so these are summed as int64 and wrap around afterwards."""
    dtype = tensors[0].dtype
    if dtype not in NARROW:
        return op.Einsum(*tensors, equation=equation)
    return op.Cast(op.Einsum(*(op.Cast(t, to=INT64.dtype) for t in tensors), equation=equation), to=dtype)


def affine(x: Any, weight: Any, bias: Any) -> Any:
    """Mul-14, Add-14."""
    return op.Add(op.Mul(x, weight), bias)


def reshape(x: Any, shape: Sequence[INT64]) -> Any:
    """Reshape-21 in which a size of 0 is 0, as in torch, and not that of the input."""
    sizes: list[Any] = []
    for fixed, group in itertools.groupby(shape, key=lambda size: isinstance(size, int)):
        if fixed:
            sizes.append(op.Constant(value_ints=list(group)))
        else:
            sizes.extend(op.Reshape(size, op.Constant(value_ints=[1])) for size in group)
    return op.Reshape(x, sizes[0] if len(sizes) == 1 else op.Concat(*sizes, axis=0), allowzero=1)


def sort(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK-11 of all elements along an axis: of equal ones the first comes first."""
    if len(x.shape) == 0:
        return op.Identity(x), op.Constant(value_int=0)
    axis = dim % len(x.shape)
    return op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    operators = torch.ops.repquant_fx
    return {
        operators.quantize.default: quantize,
        operators.dequantize.default: dequantize,
        operators.log2_softmax.default: log2_softmax,
        operators.log2_quantize.default: log2_quantize,
        torch.ops.aten.rms_norm.default: rms_norm,
        operators.affine.default: affine,
        torch.ops.aten.einsum.default: einsum,
        torch.ops.aten.reshape.default: reshape,
        torch.ops.aten.sort.stable: sort,
    }
