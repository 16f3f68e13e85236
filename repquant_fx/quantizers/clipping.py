"""Per-channel dual clipping (RepQuant Eq. 18-20): an upper and a lower bound for every channel of an activation.

`learn_bounds` is the paper's optimisation with Adam and a straight-through estimator, kept as the reference.
`search_bounds` is the default. Channels do not interact in Eq. 20, so each is a two-dimensional search; alternating exact
line searches over the lower and the upper bound, for all channels at once, need no gradient.
Both start from min-max and return whichever bounds had the smallest error on the sample, so they never do worse than it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.quantizers.uniform import parameters_from_range, quantize

CHUNK = 1 << 24  # elements worked on at once: bounds the memory of the search


@dataclass(frozen=True)
class Bounds:
    """Bounds of shape (D,) and the mean squared error of each channel on the sample, shape (D,)."""

    low: Tensor
    up: Tensor
    error: Tensor


def clipping_error(x: Tensor, low: Tensor, up: Tensor, bits: int, *, include_zero: bool = False) -> Tensor:
    """Mean squared error of quantizing each channel with bounds [low, up].

    Args:
        x: sample, shape (D, N), one row a channel.
        low, up: shape (D,).

    Returns:
        shape (D,).
    """
    rows = max(1, CHUNK // max(1, x.shape[1]))
    errors = []
    for part, lo, hi in zip(x.split(rows), low.split(rows), up.split(rows)):
        scale, zero_point = parameters_from_range(lo, hi, bits, include_zero=include_zero)
        scale, zero_point = scale[:, None], zero_point[:, None]
        codes = quantize(part, scale, zero_point, bits)
        errors.append(((codes - zero_point) * scale - part).square_().mean(dim=1))
    return torch.cat(errors)


def minmax_bounds(x: Tensor, bits: int, *, include_zero: bool = False) -> Bounds:
    """Bounds at the extremes of each channel. `x` has shape (D, N)."""
    low, up = x.amin(dim=1), x.amax(dim=1)
    return Bounds(low, up, clipping_error(x, low, up, bits, include_zero=include_zero))


def percentile_bounds(x: Tensor, bits: int, percentile: float, *, include_zero: bool = False) -> Bounds:
    """Bounds at the (1 - p) and p quantiles of each channel, `p = percentile / 100`. `x` has shape (D, N)."""
    p = percentile / 100
    ordered = x.sort(dim=1).values
    n = x.shape[1]
    low = ordered[:, min(n - 1, max(0, round((1 - p) * (n - 1))))]
    up = ordered[:, max(0, min(n - 1, round(p * (n - 1))))]
    return Bounds(low, up, clipping_error(x, low, up, bits, include_zero=include_zero))


def search_bounds(
    x: Tensor, bits: int, *, include_zero: bool = False, fractions: int = 24, rounds: int = 3, refinements: int = 2
) -> Bounds:
    """Bounds that minimise Eq. 20, by alternating line searches.

    Each line search moves one bound of every channel from its extreme towards the channel's median, over `fractions`
    positions, keeps the best, and repeats on a finer interval around it `refinements` times. Bounds move between the
    extreme and the median rather than towards 0, so a channel that lies wholly on one side of 0 is handled alike.

    Args:
        x: sample, shape (D, N).
        rounds: how often low and up alternate.
    """
    best = minmax_bounds(x, bits, include_zero=include_zero)
    low, up, error = best.low.clone(), best.up.clone(), best.error.clone()
    extreme_low, extreme_up = low.clone(), up.clone()
    median = x.median(dim=1).values
    position = {"low": torch.zeros_like(low), "up": torch.zeros_like(up)}  # 0 at the extreme, 1 at the median

    def evaluate(side: str, t: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.lerp(extreme_low if side == "low" else extreme_up, median, t)
        a, b = (moved, up) if side == "low" else (low, moved)
        return moved, clipping_error(x, a, b, bits, include_zero=include_zero)

    def shrink_both(t: float) -> None:
        """A joint move: at few bits both bounds must shrink together before either alone pays."""
        nonlocal low, up, error
        fraction = torch.full_like(low, t)
        a, b = torch.lerp(extreme_low, median, fraction), torch.lerp(extreme_up, median, fraction)
        e = clipping_error(x, a, b, bits, include_zero=include_zero)
        better = e < error
        low, up, error = torch.where(better, a, low), torch.where(better, b, up), torch.where(better, e, error)
        for side in position:
            position[side] = torch.where(better, fraction, position[side])

    for i in range(1, fractions):
        shrink_both(i / fractions)
    for turn in range(rounds):
        before = error.clone()
        width = 1.0 if turn == 0 else 2.0 / fractions
        for _ in range(refinements):
            for side in ("low", "up"):
                centre = position[side].clone()
                steps = torch.linspace(-width, width, fractions + 1).tolist()
                for step in steps:
                    t = (centre + step).clamp(0, 0.98)
                    moved, e = evaluate(side, t)
                    better = e < error
                    error = torch.where(better, e, error)
                    position[side] = torch.where(better, t, position[side])
                    if side == "low":
                        low = torch.where(better, moved, low)
                    else:
                        up = torch.where(better, moved, up)
            width *= 4.0 / fractions
        if not bool((error < before * (1 - 1e-4)).any()):
            break
    return Bounds(low, up, error)


def learn_bounds(
    x: Tensor, bits: int, *, include_zero: bool = False, iterations: int = 100, lr: float = 0.01, alpha: float = 4.0
) -> Bounds:
    """The paper's dual clipping (Eq. 18-20): `up = max * sigmoid(a1)`, `low = min * sigmoid(a2)`, learned with Adam.

    The product form contracts towards 0. For a channel whose minimum is positive (or maximum negative) it would move the
    bound outwards, so there the contraction is taken relative to the other extreme: bounds stay inside [min, max].

    Args:
        x: sample, shape (D, N).
        iterations, lr: the paper's 100 and 0.01.
        alpha: initial value of both factors; the paper does not give one, sigmoid(4) = 0.982.
    """
    start = minmax_bounds(x, bits, include_zero=include_zero)
    low0, up0 = start.low, start.up
    anchor_low = torch.where(low0 > 0, up0, torch.zeros_like(low0))  # where a fully contracted bound would end
    anchor_up = torch.where(up0 < 0, low0, torch.zeros_like(up0))
    a1 = torch.full_like(up0, alpha, requires_grad=True)
    a2 = torch.full_like(low0, alpha, requires_grad=True)
    optimizer = torch.optim.Adam([a1, a2], lr=lr)
    top = (1 << bits) - 1
    best_low, best_up, best_error = low0.clone(), up0.clone(), start.error.clone()
    with torch.enable_grad():
        for _ in range(iterations):
            up = anchor_up + (up0 - anchor_up) * torch.sigmoid(a1)
            low = anchor_low + (low0 - anchor_low) * torch.sigmoid(a2)
            lo, hi = (low.clamp(max=0), up.clamp(min=0)) if include_zero else (low, up)
            scale = (hi - lo).clamp(min=1e-8) / top
            z = -lo / scale
            z = z + (torch.round(z) - z).detach()
            q = x / scale[:, None]
            q = q + (torch.round(q) - q).detach()
            reconstructed = ((q + z[:, None]).clamp(0, top) - z[:, None]) * scale[:, None]
            errors = (reconstructed - x).square().mean(dim=1)
            optimizer.zero_grad()
            errors.sum().backward()
            optimizer.step()
            with torch.no_grad():
                better = errors < best_error
                best_error = torch.where(better, errors, best_error)
                best_low, best_up = torch.where(better, low, best_low), torch.where(better, up, best_up)
    best_low, best_up = best_low.detach(), best_up.detach()
    final = clipping_error(x, best_low, best_up, bits, include_zero=include_zero)
    worse = final > start.error
    return Bounds(torch.where(worse, low0, best_low), torch.where(worse, up0, best_up), torch.minimum(final, start.error))
