"""Choose the quantizer of an activation from a sample of its values, as pure functions: tensors in, a quantizer out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from repquant_fx.quantizers import clipping, logarithmic
from repquant_fx.quantizers.balance import Weight, balance
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.uniform import parameters_from_range
from repquant_fx.recipe import Recipe

SMOOTHING = 0.5  # how much of the difficulty goes from activations to weights
STEPS = {"log": (2, 1, 4, 8), "log_sqrt2": (2,), "log2": (1,)}  # codes per octave to choose from
# smallest step of a channel, of its largest value: four roundings of float32 move that by 2^-10 of the step
FINEST = 2.0**-12
PAYS = 0.8  # of the error of a product: what must be left of it for rows to be divided by their sum
ONE_SIDED = 0.25  # a range that reaches less far to one side than this share of the other has no symmetric grid
THINNED = 1 << 18  # values of a sample that bounds for a whole tensor are searched in


def tensor_quantizer(sample: Tensor, bits: int, recipe: Recipe) -> UniformQuantizer:
    """One scale for all values; the zero point is a code, the middle one where the recipe asks for symmetric grids.

    Args:
        sample: shape (1, N), float32.
    """
    low, up = _tensor_bounds(sample, bits, recipe)
    if recipe.symmetric and min(-low, up) >= ONE_SIDED * max(-low, up) > 0:
        return UniformQuantizer(*_around_zero(low, up, bits), bits)
    return UniformQuantizer(*parameters_from_range(low, up, bits, include_zero=True), bits)


def norm_quantizer(
    sample: Tensor, bits: int, recipe: Recipe, weights: Sequence[Weight], *, keep_zero: bool, bias: Tensor | None = None
) -> UniformQuantizer:
    """The output of a norm: one scale per channel (to be reparameterized), or one for all where the recipe says
    `layerwise`.

    Args:
        sample: shape (D, N), float32.
        weights: those that read it, float32 of shape (out, D), and what becomes of them.
        keep_zero: give all channels the middle code as zero point, so that the reparameterization shifts nothing.
        bias: of the norm, shape (D,). The rest of a value is what a kernel computes and rounds, and a channel in which
            that is nearly constant gets no finer steps than it has digits: codes would be made of the rounding.
    """
    if recipe.norm == "layerwise":
        return tensor_quantizer(_thinned(sample.reshape(1, -1)), bits, recipe)
    if recipe.norm == "smooth":
        return _smoothed(sample, bits, recipe, torch.stack([weight.abs().amax(0) for weight, _, _ in weights]).amax(0))
    bounds = _channel_bounds(sample, bits, recipe.clipping)
    low, up = bounds.low.double(), bounds.up.double()
    if keep_zero:
        return UniformQuantizer(*_around_zero(low, up, bits), bits)
    computed = sample.double() if bias is None else sample.double() - bias.double()[:, None]
    finest = (FINEST * computed.abs().amax(1)).clamp(min=torch.finfo(torch.float32).tiny)
    scale, zero_point = parameters_from_range(low, up, bits, include_zero=False, finest=finest)
    if recipe.balance and recipe.norm == "reparameterize":
        scale, zero_point = balance(sample, scale, zero_point, bits, weights, finest)
    return UniformQuantizer(scale, zero_point, bits)


def softmax_quantizer(
    values: Tensor, largest: float, bits: int, softmax: str, product: Callable[[Tensor], Tensor], *,
    normalize: bool = False,
) -> LogQuantizer:
    """Codes per octave and scale with the smallest error of the product that reads the probabilities.

    Args:
        values: probabilities, any shape.
        largest: the largest probability of all data.
        softmax: a key of `STEPS`.
        product: of such probabilities with the other operand.
        normalize: rows (the last axis of `values`) may be divided by their sum, and are where that pays.
    """
    scales = {steps: logarithmic.scale_candidates(largest, bits, steps) for steps in STEPS[softmax]}
    error, plain = _smallest_error(values, bits, scales, product)
    if normalize:
        left, divided = _smallest_error(values, bits, scales, lambda rows: product(logarithmic.normalized(rows)))
        if left < PAYS * error:
            return LogQuantizer(float(divided.scale), bits, divided.steps, normalized=True)
    return plain


def softmax_quantizer_by_percentile(sample: Tensor, bits: int, softmax: str) -> LogQuantizer:
    """Codes per octave and, among a few percentiles, the scale with the smallest error of the probabilities themselves.

    Args:
        sample: shape (N,); not all of it zero.
        softmax: a key of `STEPS`.
    """
    ordered = sample.sort().values
    picks = {float(ordered[int(p * (len(ordered) - 1))]) for p in (0.999, 0.9999, 0.99999, 1.0)}
    scales = {steps: sorted({logarithmic.snap(s, bits, steps) for s in picks if s > 0}) for steps in STEPS[softmax]}
    return _smallest_error(sample, bits, scales, lambda values: values)[1]


def _smallest_error(
    values: Tensor, bits: int, scales: Mapping[int, Sequence[float]], product: Callable[[Tensor], Tensor]
) -> tuple[float, LogQuantizer]:
    """The mean squared error and the quantizer, of the scales to try, by codes per octave."""
    exact, log, best = product(values), torch.log(values), (math.inf, 1.0, 1)
    for steps, candidates in scales.items():
        for scale in candidates:
            codes = logarithmic.quantize_log(log, scale, bits, steps)
            restored = logarithmic.level_table(scale, bits, steps).to(codes.device)[codes.int()]
            best = min(best, (float((product(restored) - exact).square().mean()), scale, steps))
    return best[0], LogQuantizer(best[1], bits, best[2])


def _tensor_bounds(sample: Tensor, bits: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Lower and upper bound, 0-d, of a sample of shape (1, N)."""
    if recipe.activations == "minmax":
        bounds = clipping.minmax_bounds(sample, bits, include_zero=True)
    elif recipe.activations == "percentile":
        bounds = clipping.percentile_bounds(sample, bits, recipe.percentile, include_zero=True)
    else:
        bounds = clipping.search_bounds(sample, bits, include_zero=True)
    return bounds.low[0], bounds.up[0]


def _channel_bounds(sample: Tensor, bits: int, method: str) -> clipping.Bounds:
    if method == "search":
        return clipping.search_bounds(sample, bits)
    if method == "adam":
        return clipping.learn_bounds(sample, bits)
    return clipping.minmax_bounds(sample.double(), bits)


def _around_zero(low: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales of the shape of the bounds, with the middle code as everyone's zero point."""
    middle, top = float(1 << (bits - 1)), float((1 << bits) - 1)
    scale = torch.maximum(-low / middle, up / (top - middle)).clamp(min=1e-8)
    return scale, torch.full_like(scale, middle)


def _smoothed(sample: Tensor, bits: int, recipe: Recipe, weight_reach: Tensor) -> UniformQuantizer:
    """SmoothQuant (arXiv 2211.10438, Eq. 4): divide channel j by `max|X_j|^a / max|W_j|^(1-a)`, then use one scale for
    all.

    As per-channel scales with a common zero point; the reparameterization of norms then does the rest.
    """
    reach, weight = sample.abs().amax(1).double(), weight_reach.double()
    factor = reach.clamp(min=1e-5) ** SMOOTHING / weight.clamp(min=1e-5) ** (1 - SMOOTHING)
    low, up = _tensor_bounds(_thinned((sample.double() / factor[:, None]).reshape(1, -1)), bits, recipe)
    scale, zero_point = parameters_from_range(low.double(), up.double(), bits, include_zero=True)
    return UniformQuantizer(scale * factor, zero_point.expand(len(factor)).clone(), bits)


def _thinned(sample: Tensor) -> Tensor:
    """Every k-th value of a (1, N) sample, with its extremes."""
    if sample.shape[1] <= THINNED:
        return sample
    stride = -(-sample.shape[1] // THINNED)
    return torch.cat([sample[:, ::stride], sample.amin(1, keepdim=True), sample.amax(1, keepdim=True)], dim=1)
