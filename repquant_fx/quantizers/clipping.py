"""Per-channel dual clipping (RepQuant Eq. 18-20): an upper and a lower bound for every channel of an activation.

`learn_bounds` is the paper's optimisation with Adam and a straight-through estimator, kept for comparison.
`search_bounds` is the default. Channels do not interact in Eq. 20, so each is a two-dimensional search; alternating
line searches over the lower and the upper bound, for all channels at once, need no gradient. From a histogram of each
channel a candidate's error costs a few lookups, whatever the size of the sample.
Both start from min-max and return whichever bounds had the smallest error on the sample, so they never do worse than
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.quantizers.uniform import levels, parameters_from_range, quantize

CHUNK = 1 << 22  # elements worked on at once: bounds the memory of the search


@dataclass(frozen=True)
class Bounds:
    """Bounds of shape (D,) and the mean squared error of each channel on the sample, shape (D,)."""

    low: Tensor
    up: Tensor
    error: Tensor


def clipping_error(x: Tensor, low: Tensor, up: Tensor, bits: int, *, include_zero: bool = False) -> Tensor:
    """Mean squared error of quantizing each channel with bounds [low, up].

    Args:
        x: sample, shape (D, N), one row per channel.
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


class _Histogram:
    """Histograms of the rows of a sample, with running sums: the error of a candidate costs `2^bits` lookups, not a
    pass over the data.

    Code all values with the largest level `v`, and let the values below each threshold `t` (midway between two levels
    that lie `s` apart) drop by one level. A drop lowers the squared error of `x` by `2 s (t - x)`, so a row's error is

        sum (x - v)^2 - 2 s sum_t f(t),    f(t) = sum_{x < t} (t - x) = t * (how many) - (their sum).

    `f` is known at the bins' edges and linear between them as far as anyone can tell. Bins are narrow around the median
    and widen with the distance `u` from it (evenly spaced in `sqrt(1 + |u|)`, in distances of the quartiles), so that
    an outlier costs the others no resolution.

    Attributes:
        low, up, median: of each row, shape (D, 1); the median to the width of a bin.
    """

    def __init__(self, x: Tensor, bins: int) -> None:
        rows, self.n = x.shape
        self.bins = bins
        self.low, self.up = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        some = x[:, :: max(1, self.n // 256)].sort(dim=1).values
        quarter = [some[:, [(some.shape[1] - 1) * k // 4]] for k in (1, 2, 3)]
        self.centre = quarter[1]
        self.spread = torch.maximum(quarter[2] - quarter[0], (self.up - self.low) * 1e-5).clamp(
            min=torch.finfo(x.dtype).tiny ** 0.5
        )
        ends = [_squash((end - self.centre) / self.spread) for end in (self.low, self.up)]
        self.first, self.step = ends[0], ((ends[1] - ends[0]) / bins).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
        steps = torch.arange(bins + 1, dtype=torch.float64, device=x.device)
        squashed = self.first.double() + self.step.double() * steps
        edges = self.centre.double() + self.spread.double() * squashed * (2 + squashed.abs())
        edges[:, :1], edges[:, -1:] = self.low.double(), self.up.double()
        index = self._position(x).to(torch.int64).clamp_(0, bins - 1)
        index += torch.arange(0, rows * bins, bins, device=x.device)[:, None]
        index, values = index.reshape(-1), x.double().reshape(-1)
        counts = torch.bincount(index, minlength=rows * bins).view(rows, bins).cumsum(1)
        sums = torch.bincount(index, weights=values, minlength=rows * bins).view(rows, bins).cumsum(1)
        # f at the edges
        self.below = edges * torch.nn.functional.pad(counts, (1, 0)) - torch.nn.functional.pad(sums, (1, 0))
        self.total, self.squares = sums[:, -1:], values.square().view(rows, -1).sum(1, keepdim=True)
        half = torch.searchsorted(counts, torch.full_like(counts[:, :1], (self.n + 1) // 2))
        self.median = edges.gather(1, half).to(x.dtype).clamp(self.low, self.up)

    def _position(self, x: Tensor) -> Tensor:
        """In bins from the lowest edge."""
        return _squash((x - self.centre) / self.spread).sub_(self.first).div_(self.step)

    def errors(self, low: Tensor, up: Tensor, bits: int, include_zero: bool) -> Tensor:
        """Mean squared errors, shape (D, K) in float64, of K candidates per row; `low`, `up` of shape (D, K)."""
        scale, zero_point = parameters_from_range(low, up, bits, include_zero=include_zero)
        top = levels(bits) - 1
        codes = torch.arange(top, dtype=scale.dtype, device=scale.device)
        thresholds = (scale[..., None] * (codes + 0.5 - zero_point[..., None])).flatten(1)
        position = self._position(thresholds).clamp_(0, self.bins)
        index = position.to(torch.int64).clamp_(max=self.bins - 1)
        drops = torch.lerp(self.below.gather(1, index), self.below.gather(1, index + 1), (position - index).double())
        drops += self.n * (thresholds - self.up).clamp_(min=0)  # beyond the largest value f is a straight line
        s, v = scale.double(), scale.double() * (top - zero_point.double())
        return (
            self.squares - 2 * v * self.total - 2 * s * drops.unflatten(1, (-1, top)).sum(dim=2)
        ) / self.n + v.square()


def _squash(u: Tensor) -> Tensor:
    return torch.copysign(torch.sqrt(1 + u.abs()) - 1, u)


def search_bounds(x: Tensor, bits: int, *, include_zero: bool = False) -> Bounds:
    """Bounds that minimise Eq. 20, by alternating line searches.

    Bounds move from the extremes of a channel towards its median rather than towards 0, so a channel that lies wholly
    on one side of 0 is handled alike. First both move together (at few bits neither alone pays), then one after the
    other: each line search tries evenly spaced positions around the best so far, then again on a finer interval.
    The bounds returned are compared with min-max on the data itself, channel by channel, and are never worse.

    Args:
        x: sample, shape (D, N).
    """
    rows = max(1, CHUNK // max(x.shape[1], _bins(bits), 25 << bits))
    bounds = [_search(part, bits, include_zero) for part in x.split(rows)]
    low, up = torch.cat([b[0] for b in bounds]), torch.cat([b[1] for b in bounds])
    start = minmax_bounds(x, bits, include_zero=include_zero)
    error = clipping_error(x, low, up, bits, include_zero=include_zero)
    worse = error > start.error
    return Bounds(
        torch.where(worse, start.low, low), torch.where(worse, start.up, up), torch.minimum(error, start.error)
    )


def _bins(bits: int) -> int:
    return 2048 if bits <= 5 else 4096


def _search(x: Tensor, bits: int, include_zero: bool) -> tuple[Tensor, Tensor]:
    # lookups grow with 2^bits while the gain from clipping shrinks: above 5 bits fewer positions and rounds do as well
    begin, points, zooms, zoom, rounds = (24, 25, 2, 1 / 6, 3) if bits <= 5 else (16, 9, 3, 2 / 9, 2)
    data = _Histogram(x, _bins(bits))

    def bounds(position: Tensor) -> tuple[Tensor, Tensor]:
        """Low and up at positions (2, D, K): 0 at the extreme, 1 at the median."""
        return torch.lerp(data.low, data.median, position[0]), torch.lerp(data.up, data.median, position[1])

    def best_of(candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the candidate positions (2, D, K) as (2, D, 1), and its error (D, 1)."""
        error, index = data.errors(*bounds(candidates), bits, include_zero).min(dim=1, keepdim=True)
        return candidates.gather(2, index.expand(2, -1, -1)), error

    together = torch.arange(begin, dtype=x.dtype, device=x.device) / begin
    position, error = best_of(together.expand(2, len(x), -1))
    for turn in range(rounds):
        before = error
        width = 1.0 if turn == 0 else 1 / 12
        for _ in range(zooms):
            steps = torch.linspace(-width, width, points, dtype=x.dtype, device=x.device)
            for side in (0, 1):
                candidates = position.repeat(1, 1, points)
                candidates[side] = (candidates[side] + steps).clamp(0, 0.98)
                position, error = best_of(candidates)
            width *= zoom
        if not bool((error < before * (1 - 1e-4)).any()):
            break
    low, up = bounds(position)
    return low[:, 0], up[:, 0]


def learn_bounds(
    x: Tensor, bits: int, *, include_zero: bool = False, iterations: int = 100, lr: float = 0.01, alpha: float = 4.0
) -> Bounds:
    """The paper's dual clipping (Eq. 18-20): `up = max * sigmoid(a1)`, `low = min * sigmoid(a2)`, learned with Adam.

    The product form contracts towards 0. For a channel wholly on one side of 0 it would move one bound outwards and the
    other across it, so there each is contracted towards the other extreme: bounds stay inside [min, max].

    Args:
        x: sample, shape (D, N).
        iterations, lr: the paper's 100 and 0.01.
        alpha: initial value of both factors; the paper does not give one, sigmoid(4) = 0.982.
    """
    start = minmax_bounds(x, bits, include_zero=include_zero)
    low0, up0 = start.low, start.up
    one_sided = (low0 > 0) | (up0 < 0)
    anchor_low = torch.where(one_sided, up0, torch.zeros_like(low0))  # where a fully contracted bound would end
    anchor_up = torch.where(one_sided, low0, torch.zeros_like(up0))
    a1 = torch.full_like(up0, alpha, requires_grad=True)
    a2 = torch.full_like(low0, alpha, requires_grad=True)
    optimizer = torch.optim.Adam([a1, a2], lr=lr)
    # a channel's loss in units of its min-max error: Adam's epsilon would otherwise stop channels of small range
    unit = start.error.clamp(min=torch.finfo(x.dtype).tiny)
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
            (errors / unit).sum().backward()
            optimizer.step()
            with torch.no_grad():
                better = errors < best_error
                best_error = torch.where(better, errors, best_error)
                best_low, best_up = torch.where(better, low, best_low), torch.where(better, up, best_up)
    best_low, best_up = best_low.detach(), best_up.detach()
    final = clipping_error(x, best_low, best_up, bits, include_zero=include_zero)
    worse = final > start.error
    return Bounds(
        torch.where(worse, low0, best_low), torch.where(worse, up0, best_up), torch.minimum(final, start.error)
    )
