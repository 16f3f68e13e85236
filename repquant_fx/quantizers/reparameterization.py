"""Scale reparameterization (RepQuant Eq. 10-14): from a per-channel quantizer to a per-tensor one with the same
codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.quantizers.affine import into_reader, into_writer


@dataclass(frozen=True)
class ChannelAffine:
    """The exact map `x -> (x + shift) / ratio` between an activation and its reparameterized form.

    Attributes:
        ratio: `r1 = s / s~`, shape (D,), positive.
        shift: `s * r2` with `r2 = z - z~`, shape (D,).
        scale, zero_point: the per-tensor `s~` and `z~`, 0-d.
    """

    ratio: Tensor
    shift: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def added(self) -> Tensor:
        """What the map adds to `x / ratio`, shape (D,)."""
        return self.shift / self.ratio

    def apply(self, x: Tensor) -> Tensor:
        """The reparameterized activation; the channel axis of `x` is last."""
        return (x + self.shift) / self.ratio

    def rewrite_norm(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`gamma / r1` and `(beta + s * r2) / r1` (Eq. 12). A norm without affine gains one."""
        one = torch.ones_like(self.ratio) if weight is None else weight
        return into_writer(one, bias, self.ratio, -self.shift)

    def rewrite_linear(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`W diag(r1)` and `bias - W (s * r2)` (Eq. 14), with W of shape (out, D). A Linear without bias gains one."""
        return into_reader(weight, bias, self.ratio, -self.shift)


def reparameterize(scale: Tensor, zero_point: Tensor, bits: int, *, symmetric: bool = False) -> ChannelAffine:
    """Choose `s~`, `z~` for per-channel `s`, `z` of shape (D,) and return the affine that links them.

    Any scalars are exact. As in the paper `s~ = mean(s)`, `z~ = mean(z)`; the latter is rounded and brought into
    [0, 2^bits - 1], which a stored zero point must satisfy, and `r2` takes up the difference exactly. With `symmetric`
    it is the middle code instead, just as exactly: as signed integers the codes have no zero point.
    Arithmetic is done in the dtype given; pass float64 to keep the identity tight.
    """
    tensor_scale = scale.mean()
    tensor_zero_point = zero_point.mean().round().clamp(0, (1 << bits) - 1)
    if symmetric:
        tensor_zero_point = torch.full_like(tensor_zero_point, 1 << (bits - 1))
    return ChannelAffine(
        scale / tensor_scale, scale * (zero_point - tensor_zero_point), tensor_scale, tensor_zero_point
    )
