"""The operators of a lowered graph, registered with torch so that the FX reference runs and torch.export keeps them
whole.

Each has exactly one ONNX counterpart (see `exporters.translations`), and computes with the same rounding:

| operator | ONNX |
|---|---|
| `repquant_fx::quantize` | QuantizeLinear-21, then Min where bits < 8 |
| `repquant_fx::dequantize` | DequantizeLinear-21 |
| `repquant_fx::affine` | Mul, Add |
| `repquant_fx::log2_softmax` | the model-local function `repquant_fx.Log2Softmax` |
| `repquant_fx::log2_quantize` | the model-local function `repquant_fx.Log2Quantize` |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repquant_fx.errors import InputError
from repquant_fx.quantizers import logarithmic, uniform


def hold(condition: object, what: str) -> None:
    """A check in a traced program: that a size which follows from values is the one that it was traced for.

    It is no operator of torch: exporting the graph leaves it out.

    Raises:
        InputError: it is another size.
    """
    if condition is False:  # in a fake run it is symbolic
        expression = what.partition("expression ")[2].partition(" on node")[0] or what
        raise InputError(
            f"the model computes a size from values, and was captured for one size alone ({expression}, of the example "
            "inputs): other data gives another; give example inputs and calibration data that agree, or take that part "
            "out of the model"
        )


torch.fx.node.has_side_effect(hold)


@torch.library.custom_op("repquant_fx::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int) -> Tensor:
    """uint8 codes of `x`. `axis = -1` with a 0-d scale is per tensor; else `scale`, `zero_point` hold one value per
    channel.
    """
    return uniform.quantize(x, scale, zero_point.to(x.dtype), bits, axis if scale.ndim else None).to(torch.uint8)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("repquant_fx::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, block: int = 0) -> Tensor:
    """float32 values of integer codes. `bits` tells the exporter how to store constant codes; with a `block` so many
    of them along `axis` share a scale, which has as many axes as the codes then.
    """
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    if block:
        scale, zero = (t.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis]) for t in (scale, zero))
        return (codes.to(scale.dtype) - zero) * scale
    return uniform.dequantize(codes.to(scale.dtype), scale, zero, axis if scale.ndim else None)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, block: int = 0) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("repquant_fx::affine", mutates_args=())
def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x * weight + bias`, a factor and a shift per channel of the last axis; it can be differentiated."""
    return x * weight + bias


@affine.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    rows = tuple(range(gradient.ndim - 1))
    return gradient * weight, (gradient * x).sum(rows), gradient.sum(rows)


affine.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("repquant_fx::log2_softmax", mutates_args=())
def log2_softmax(logits: Tensor, scale: Tensor, dim: int, bits: int, steps: int) -> Tensor:
    """Softmax over `dim`, log-quantized: the values of `bits`-bit codes with `steps` codes per octave."""
    codes = logarithmic.quantize_log(torch.log_softmax(logits, dim), float(scale), bits, steps)
    return logarithmic.dequantize(codes, float(scale), bits, steps)


@log2_softmax.register_fake
def _(logits: Tensor, scale: Tensor, dim: int, bits: int, steps: int) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("repquant_fx::log2_quantize", mutates_args=())
def log2_quantize(a: Tensor, scale: Tensor, bits: int, steps: int) -> Tensor:
    """Log-quantized non-negative values, for a Softmax that has other readers."""
    codes = logarithmic.quantize(a, float(scale), bits, steps)
    return logarithmic.dequantize(codes, float(scale), bits, steps)


@log2_quantize.register_fake
def _(a: Tensor, scale: Tensor, bits: int, steps: int) -> Tensor:
    return torch.empty_like(a)
