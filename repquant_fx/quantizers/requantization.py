"""A Linear that writes codes: the scales and zero points of the operands that it feeds go into its weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.quantizers.bias import LIMIT, QuantizedBias


@dataclass(frozen=True)
class Operand:
    """What some output channels of a Linear feed.

    Attributes:
        channels: int64, shape (n,).
        scale: of its codes in units of the Linear's output, float64, 0-d.
        zero_point: float64, 0-d.
    """

    channels: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Codes:
    """What a Linear that writes codes gives: its float output is `(output - offset) * step`.

    Attributes:
        step, offset: one for each output channel, shape (out,), float64.
    """

    step: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Requantization:
    """What becomes of a Linear.

    Attributes:
        weight_scale: float32, shape (out,).
        bias: with what the zero points differ by from that of the first operand.
        output: how to read what it gives then.
        apart: of a code; how far an operand's values move at most, to meet the grid of the accumulator.
    """

    weight_scale: Tensor
    bias: QuantizedBias
    output: Codes
    apart: float


def requantize(
    input_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, operands: Sequence[Operand]
) -> Requantization | None:
    """None where a scale leaves the range of float32 or the bias that of int32.

    Args:
        input_scale, weight_scale: float32, 0-d and of shape (out,).
        bias: its codes, int32, shape (out,).
        operands: each output channel feeds one of them at most.
    """
    old = weight_scale.double()
    step, zero_point = torch.ones_like(old), torch.zeros_like(old)
    for operand in operands:
        step[operand.channels] = operand.scale
        zero_point[operand.channels] = operand.zero_point - operands[0].zero_point
    scale = (old / step).float()
    bias_scale = input_scale * scale
    offset = torch.round(zero_point / bias_scale.double())
    codes = offset + (0 if bias is None else bias.double())
    if not bool((scale > 0).all() and torch.isfinite(scale).all() and (codes.abs() < LIMIT).all()):
        return None
    moved = offset * bias_scale.double()
    return Requantization(scale, QuantizedBias(codes.to(torch.int32), bias_scale), Codes(step, moved),
                          float((moved - zero_point).abs().max()))
