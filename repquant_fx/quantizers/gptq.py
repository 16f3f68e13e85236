"""GPTQ (arXiv 2210.17323): weight rounding that compensates its own error through the inverse Hessian of the layer's
input.

Works on W of shape (out, in), codes per output channel. The arithmetic is batched over rows, and Linears that share an
input
share one factorisation: stack their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.errors import CalibrationError, PassError

LEAVES = 0.45  # of the amplitude of what rounding to nearest does to the output, about; for estimates


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes: `weight ~ (codes - zero_point) * scale`.

    Attributes:
        codes: int8, shape (out, in). Without a zero point these are `q - z`, so that the stored one is 0.
        scale: float32, shape (out,); (out, groups) where `group` inputs share one, the last group may have fewer.
        zero_point: int8, of the shape of `scale`; None for 0.
        group: how many inputs share a scale; 0 for all.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group: int = 0

    def to(self, device: str | torch.device) -> QuantizedWeight:
        """The same on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), zero_point, self.group)

    def dequantize(self) -> Tensor:
        """float32 weight, shape (out, in)."""
        codes, inputs = self.codes.to(torch.float32), self.codes.shape[1]
        if self.zero_point is not None:
            codes = codes - per_input(self.zero_point, self.group, inputs)
        return codes * per_input(self.scale, self.group, inputs)


def per_input(values: Tensor, group: int, inputs: int) -> Tensor:
    """A value of each group of inputs, shape (out, groups), for each input, (out, in); one of all, (out,), as
    (out, 1).
    """
    return values.repeat_interleave(group, 1)[:, :inputs] if group else values[:, None]


@dataclass(frozen=True)
class WeightGrid:
    """Per-output-channel grid: `w ~ scale * clamp(round(w / scale), low, high)`; scale, low, high of shape (out,)."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """Integer codes (as floats) of columns or matrices `w`, shape (out, ...)."""
        view = (-1,) + (1,) * (w.ndim - 1)
        return (w / self.scale.view(view)).round_().clamp_(self.low.view(view), self.high.view(view))

    def values(self, w: Tensor) -> Tensor:
        """Nearest grid values of `w`."""
        return self.codes(w).mul_(self.scale.view((-1,) + (1,) * (w.ndim - 1)))


Grids = Callable[[int, int, Tensor, Tensor], Iterable[WeightGrid]]


def symmetric_range(bits: int) -> tuple[int, int]:
    """Code range of a symmetric grid; at 8 bits -127..127, as integer kernels expect."""
    half = 1 << (bits - 1)
    return (-127, 127) if bits == 8 else (-half, half - 1)


def weight_grid(
    weight: Tensor, bits: int, *, symmetric: bool, search: bool = True, importance: Tensor | None = None
) -> WeightGrid:
    """Per-output-channel scale and code range.

    An asymmetric grid has `2^bits` consecutive integer codes that contain 0, anywhere: the zero point is folded into
    the code range, so that the file stores zero point 0. That needs room, which 4 bits in INT4, 8 bits in INT8 and 7
    bits in sums of 16 bits do not have; the caller then asks for a symmetric one.

    Args:
        weight: shape (out, in).
        search: shrink the min-max range over 40 steps and keep the smallest (weighted) squared error, else min-max.
        importance: weights of the columns' errors, shape (in,) or (out, in), e.g. the diagonal of the Hessian.

    Raises:
        PassError: an asymmetric grid of 8 bits, whose codes would overflow int8.
    """
    if not symmetric and bits > 7:
        raise PassError(f"an asymmetric {bits}-bit weight grid does not fit int8 codes; use a symmetric one")
    top = (1 << bits) - 1
    lo0, hi0 = weight.amin(dim=1).clamp(max=0), weight.amax(dim=1).clamp(min=0)
    column = torch.ones_like(weight[0]) if importance is None else importance / importance.mean().clamp(min=1e-30)
    tiny = torch.finfo(weight.dtype).tiny * 1e6

    def grid(lo: Tensor, hi: Tensor) -> WeightGrid:
        if symmetric:
            low, high = symmetric_range(bits)
            scale = torch.maximum(hi / high, lo / low).clamp(min=tiny)
            return WeightGrid(scale, torch.full_like(scale, low), torch.full_like(scale, high))
        scale = ((hi - lo) / top).clamp(min=tiny)
        zero_point = torch.round(-lo / scale).clamp(0, top)
        return WeightGrid(scale, -zero_point, top - zero_point)

    best = grid(lo0, hi0)
    if not search:
        return best

    def error(g: WeightGrid) -> Tensor:
        return g.values(weight).sub_(weight).square_().mul_(column).sum(dim=1)

    best_error = error(best)
    shrink = torch.linspace(1.0, 0.2, 41)[1:].tolist()
    candidates = [(f, f) for f in shrink]
    if not symmetric and bits <= 4:  # with few codes the two ends must move independently
        candidates += [(a, b) for a in shrink[::4] for b in [1.0, *shrink[::4]]] + [(1.0, b) for b in shrink[::4]]
    for f_low, f_high in candidates:
        candidate = grid(lo0 * f_low, hi0 * f_high)
        e = error(candidate)
        better = e < best_error
        best_error = torch.where(better, e, best_error)
        best = WeightGrid(*(torch.where(better, a, b) for a, b in zip(
            (candidate.scale, candidate.low, candidate.high), (best.scale, best.low, best.high))))
    return best


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of every row, `d H d^T / 2` summed, shape (out,): what GPTQ minimises."""
    d = (approximation - weight).to(hessian.dtype)
    return 0.5 * ((d @ hessian) * d).sum(dim=1)


def inverse_factor(hessian: Tensor, damping: float, where: str = "") -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped inverse Hessian, and the mask of dead inputs.

    Args:
        hessian: `2 X^T X`, shape (in, in), float32 or float64.
        damping: fraction of the mean diagonal added to it. Raised tenfold, up to 10, until the factorisation succeeds.

    Raises:
        CalibrationError: the Hessian is not finite, or cannot be factorised at any damping.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(f"the Hessian of {where or 'a layer'} is not finite: its calibration inputs overflow; "
                               "check the data")
    hessian = hessian.clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    mean = hessian.diagonal().mean()
    factor = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(factor * mean)
        # H = R R^T with R upper (the Cholesky factor of H in reverse order, reversed back) gives H^-1 = U^T U with U =
        # R^-1
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(lower)).to(lower), upper=True)
            if bool(torch.isfinite(upper).all()):
                return upper, dead
        factor = max(factor * 10, 1e-4)
        if factor > 10:
            raise CalibrationError(
                f"the Hessian of {where or 'a layer'} cannot be factorised even with damping {factor / 10:g}; "
                "check the calibration data, use more of it, or switch GPTQ off for this layer"
            )


def gptq(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, *, damping: float = 0.01, block: int = 128,
    activation_order: bool = True, where: str = "",
) -> QuantizedWeight:
    """Quantize `weight` column by column, spreading each column's error over the columns not yet quantized.

    Args:
        weight: shape (out, in).
        hessian: `2 X^T X` of the *quantized* layer input, shape (in, in).
        grid: fixed before the sweep.
        block: columns updated lazily at once (the paper's 128).
        activation_order: sweep columns by decreasing Hessian diagonal. A permutation of the order only; codes come back
            in place.

    Returns:
        codes and scale. Rows whose output error would exceed round-to-nearest's keep round-to-nearest.
    """
    w0 = weight.to(hessian.dtype)
    order = (
        torch.argsort(hessian.diagonal(), descending=True, stable=True)
        if activation_order
        else torch.arange(weight.shape[1])
    )
    exact = WeightGrid(*(t.to(w0.dtype) for t in (grid.scale, grid.low, grid.high)))
    spans = [(start, min(start + block, len(order))) for start in range(0, len(order), block)]
    result = sweep(w0, hessian, order, spans, lambda start, stop, *_: [exact] * (stop - start), damping, where)
    nearest = exact.codes(torch.where(hessian.diagonal() > 0, w0, torch.zeros_like(w0)))
    scale = exact.scale[:, None]
    worse = output_error(w0, result * scale, hessian) > output_error(w0, nearest * scale, hessian)
    result = torch.where(worse[:, None], nearest, result)
    return QuantizedWeight(result.to(torch.int8), grid.scale.float())


def sweep(weight: Tensor, hessian: Tensor, order: Tensor, spans: Sequence[tuple[int, int]], grids: Grids,
          damping: float, where: str) -> Tensor:
    """Codes of the columns, rounded in an order, each column's error spread over those that follow.

    Args:
        weight: shape (out, in), in the dtype of the Hessian; so is the result.
        order: of the columns, shape (in,).
        spans: places (start, stop) in the order, together all of it; what follows a span is updated behind it.
        grids: gives the grid of each column of a span, from where it starts and stops, its columns as they are then,
            shape (columns, out), and the diagonal of the inverse's factor there.
    """
    upper, dead = inverse_factor(hessian[order][:, order], damping, where)
    w = weight.T[order].contiguous()  # one row per input, so that every step below reads contiguous memory
    w[dead] = 0
    codes = torch.empty_like(w)
    for start, stop in spans:
        errors = torch.empty_like(w[start:stop])
        found = grids(start, stop, w[start:stop], upper.diagonal()[start:stop])
        for j, grid in zip(range(start, stop), found):
            column = w[j] - upper[start:j, j] @ errors[: j - start]
            codes[j] = grid.codes(column)
            errors[j - start] = (column - codes[j] * grid.scale) / upper[j, j]
        w[stop:] -= upper[start:stop, stop:].T @ errors
    result = torch.empty_like(weight)
    result[:, order] = codes.T
    return result


def round_to_nearest(weight: Tensor, grid: WeightGrid) -> QuantizedWeight:
    """Codes without error compensation."""
    return QuantizedWeight(grid.codes(weight).to(torch.int8), grid.scale.float())
