"""Cross-layer equalization: factors (and shifts) that give the channels of an activation like ranges, as pure functions
on tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repquant_fx.quantizers.clipping import Bounds

LARGEST = 1e4  # a dead channel gets no factor beyond this
# of a channel's centre: a range that is narrower about it would be rounding in float32, in steps of a byte
NARROW = 5e-3


@dataclass(frozen=True)
class Equalization:
    """`x -> (x - shift) / factor` of each channel, by the channel's label; without an entry a factor is 1 and a shift
    0.
    """

    factors: Mapping[int, float] = field(default_factory=dict)
    shifts: Mapping[int, float] = field(default_factory=dict)

    def factor(self, labels: Tensor) -> Tensor:
        """Of each of some labels, float64, shape (C,), on the CPU."""
        return torch.tensor([self.factors.get(label, 1.0) for label in labels.tolist()], dtype=torch.float64)

    def shift(self, labels: Tensor) -> Tensor:
        """Of each of some labels, float64, shape (C,), on the CPU."""
        return torch.tensor([self.shifts.get(label, 0.0) for label in labels.tolist()], dtype=torch.float64)


def equalize(
    bounds: Mapping[str, tuple[Tensor, Bounds]], signed: Mapping[int, tuple[int, int]], shiftable: Collection[int]
) -> Equalization:
    """The geometric mean of the channels' ranges over the activations that a factor reaches, each relative to its own
    mean.

    Args:
        bounds: of each activation, by name: the labels of its channels, shape (C,), 0 and less for those that get no
            factor, and the clipping bounds of these channels.
        signed: (representative, sign) of each label that gets a factor: it is the representative's to the power of the
            sign, so 1 where the sign is 0.
        shiftable: labels that may get a shift too.
    """
    wishes: dict[int, list[float]] = {}
    centres: dict[int, list[float]] = {}
    for pattern, bound in bounds.values():
        labels, low, up = pattern.tolist(), bound.low.double().cpu(), bound.up.double().cpu()
        shifted = torch.tensor([label in shiftable for label in labels])
        half, centre = (up - low) / 2, (up + low) / 2
        left = torch.where(half < NARROW * centre.abs(), NARROW * centre, 0.0)  # not shifted away
        reach = torch.where(shifted, half + left.abs(), torch.maximum(low.abs(), up.abs()))
        reach = reach.clamp(min=max(float(reach.max()) / LARGEST, 1e-12)).log()
        reach = reach - reach.mean()
        for label, wish, shift in zip(labels, reach.tolist(), (centre - left).tolist()):
            if label > 0:
                root, sign = signed[label]
                wishes.setdefault(root, []).append(sign * wish)
                centres.setdefault(label, []).append(shift)
    wanted = {root: sum(w) / len(w) for root, w in wishes.items()}
    factors = {
        label: float(torch.exp(torch.tensor(sign * wanted.get(root, 0.0), dtype=torch.float64)))
        for label, (root, sign) in signed.items()
    }
    return Equalization(
        factors,
        {
            label: sum(centres[label]) / len(centres[label])
            for label in signed
            if label in shiftable and label in centres
        },
    )
