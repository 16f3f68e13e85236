"""Quantizers that learn: rounding passes gradients straight through, and what is learned becomes ordinary codes again.

The forward values are those of the quantizers they start from, and of those they become, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repquant_fx.quantizers.gptq import QuantizedWeight, symmetric_range
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.weight import fills_container

INSIDE = 0.49  # steps that a weight may start away from its code


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact`, bit for bit, with the gradient of `smooth`; both finite."""
    return exact.detach() + (smooth - smooth.detach())


class LearnedUniform(nn.Module):
    """A uniform quantizer per tensor whose scale and zero point move, and with them its bounds (learned step size,
    arXiv 1902.08153, with a zero point).

    Parameters, 0-d: `growth`, the logarithm of what the scale is multiplied by, and `zero_point` before rounding.
    """

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.start = quantizer.scale.detach().clone()
        self.growth = nn.Parameter(torch.zeros_like(self.start))
        self.zero_point = nn.Parameter(quantizer.zero_point.detach().clone())

    def _grid(self) -> tuple[Tensor, Tensor]:
        top = float((1 << self.bits) - 1)
        bounded = self.zero_point.clamp(0, top)
        return self.start * self.growth.exp(), straight_through(torch.round(bounded), bounded)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self._grid()
        steps = x / scale
        rounded = straight_through(torch.round(steps), steps) + zero_point
        return (rounded.clamp(0, (1 << self.bits) - 1) - zero_point) * scale

    @torch.no_grad()
    def learned(self) -> UniformQuantizer:
        """The quantizer that it has become."""
        scale, zero_point = self._grid()
        return UniformQuantizer(scale, zero_point, self.bits)


class LearnedLog(nn.Module):
    """A logarithmic quantizer whose grid stays: gradients pass straight through, but where the code is zero's."""

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        exact = self.quantizer(x.detach())
        return straight_through(exact, torch.where(exact > 0, x, torch.zeros_like(x)))


class LearnedWeight(nn.Module):
    """Integer weights whose codes and scales move.

    Parameters: `codes`, the weight before rounding, in steps of its scale; `growth`, the logarithm of what the scale of
    each output channel is multiplied by, shape (out, 1, ...).

    Args:
        weight: codes, and scales of shape (out,).
        latent: the float weight that the codes stand for, in their shape; None where it is not known.
        bits: width of the window of codes that a channel may use.
    """

    def __init__(self, weight: QuantizedWeight, latent: Tensor | None, bits: int) -> None:
        super().__init__()
        shape = (-1, *[1] * (weight.codes.ndim - 1))
        codes = weight.codes.to(weight.scale.dtype)
        self.start = weight.scale.detach().reshape(shape)
        self.low, self.up = (bound.reshape(shape) for bound in code_window(weight.codes, bits))
        offset = torch.zeros_like(codes)
        if latent is not None:
            offset = (latent / self.start - codes).nan_to_num(0).clamp(-INSIDE, INSIDE)
        self.codes = nn.Parameter(codes + offset)
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def _rounded(self) -> Tensor:
        bounded = torch.maximum(torch.minimum(self.codes, self.up), self.low)
        return straight_through(torch.round(bounded), bounded)

    def forward(self) -> Tensor:
        return self._rounded() * (self.start * self.growth.exp())

    @torch.no_grad()
    def learned(self) -> QuantizedWeight:
        """The codes and scales that it has become."""
        return QuantizedWeight(self._rounded().to(torch.int8), (self.start * self.growth.exp()).reshape(-1))


def code_window(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The `2^bits` consecutive codes that each output channel may use, shapes (out,): those it uses, widened evenly.

    4 bits fill INT4 and 8 bits are symmetric in INT8, whatever a channel uses.
    """
    flat = codes.reshape(len(codes), -1).to(torch.float32)
    if fills_container(bits):
        ends = symmetric_range(bits)
        return torch.full_like(flat[:, 0], ends[0]), torch.full_like(flat[:, 0], ends[1])
    low, up = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    spare = (1 << bits) - 1 - (up - low)
    low = low - torch.floor(spare / 2)
    return low, low + (1 << bits) - 1
