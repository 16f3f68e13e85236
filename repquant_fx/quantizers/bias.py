"""The integer bias of a matrix product, in steps of the product's accumulator: the input's scale times the weight's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 2.0**31 - 1024  # of a code: float32 cannot hold the largest int32


@dataclass(frozen=True)
class QuantizedBias:
    """`codes * scale`.

    Attributes:
        codes: int32, shape (out,).
        scale: float32, shape (out,) or 0-d.
    """

    codes: Tensor
    scale: Tensor


def round_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> QuantizedBias | None:
    """A bias to the nearest steps; None where it does not fit int32.

    Args:
        bias: shape (out,), float32.
        input_scale, weight_scale: float32, 0-d and of shape (out,).
    """
    scale = input_scale * weight_scale
    codes = torch.round(bias.double() / scale.double())
    return QuantizedBias(codes.to(torch.int32), scale) if bool((codes.abs() < LIMIT).all()) else None
