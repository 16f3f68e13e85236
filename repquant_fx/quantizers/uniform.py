"""Uniform affine quantization (RepQuant Eq. 4-6), as pure functions on tensors.

`quantize` divides by the scale and rounds half to even, which is what ONNX QuantizeLinear does, so that a code computed
here is the code ONNX Runtime computes. (Multiplying by the reciprocal instead differs at rounding boundaries.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def levels(bits: int) -> int:
    """Number of codes of a `bits`-bit quantizer."""
    return 1 << bits


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Codes `clip(round(x / scale) + zero_point, 0, 2^bits - 1)` (Eq. 4), in the dtype of `x`.

    Args:
        x: any shape.
        scale, zero_point: scalars, or one value per channel of `axis`; the zero point holds integers in a float tensor.
        bits: 1 to 16.
    """
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    return (x / s).round_().add_(z).clamp_(0, levels(bits) - 1)  # in place: memory, not arithmetic, is what it costs


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """`scale * (codes - zero_point)` (Eq. 5)."""
    return (codes - _along(zero_point, codes, axis)).mul_(_along(scale, codes, axis))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Quantize, then dequantize."""
    return dequantize(quantize(x, scale, zero_point, bits, axis), scale, zero_point, axis)


def parameters_from_range(
    low: Tensor, up: Tensor, bits: int, *, include_zero: bool, finest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, up] (Eq. 6).

    Args:
        low, up: same shape, `low <= up`.
        include_zero: widen the range to contain 0, so that the zero point lies in [0, 2^bits - 1] as a stored zero
            point must. A per-channel quantizer that is reparameterized later does not need it.
        finest: the smallest scales that make sense, positive, of the shape of `low`.

    Returns:
        scale > 0 and an integral zero point, both of the shape and dtype of `low`. A dead range (`low == up`) gets a
        scale that represents its one value with a code, and never divides by zero.
    """
    if include_zero:
        low, up = low.clamp(max=0), up.clamp(min=0)
    top = levels(bits) - 1
    width = up - low
    # A range so narrow that its zero point would not be exact in floating point is a constant: widen it around its
    # value.
    magnitude = torch.maximum(low.abs(), up.abs())
    floor = torch.maximum(magnitude * 1e-4, torch.full_like(magnitude, 1e-8))
    scale = torch.maximum(width, floor) / top
    if finest is not None:  # a whole number of steps from 0, so that a constant is not midway between two codes
        whole = magnitude / (magnitude / finest).floor().clamp(min=1)
        scale = torch.maximum(scale, torch.maximum(whole, finest))
    zero_point = torch.round(-low / scale)
    if include_zero:
        zero_point = zero_point.clamp(0, top)
    return scale, zero_point


def storable(scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """A stored zero point is a code: (the nearest one, what to add to the activation for it, None for nothing)."""
    stored = zero_point.clamp(0, levels(bits) - 1)
    return stored, None if torch.equal(stored, zero_point) else scale * (zero_point - stored)
