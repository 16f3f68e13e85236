"""How much of the differences between channels moves from an activation into the weights that read it.

With a scale of its own for each channel an activation is quantized best, and after reparameterization the columns of
the weights differ by what the channels differed: weights of few bits lose more than the activation gained. Scales
`s^a`, with `s` those of the single channels and `a` from 1 (all of it moves, the method as published) down to 0 (one
scale, nothing moves) lie between. SmoothQuant (arXiv 2211.10438, Eq. 4) fixes such an exponent; here it is chosen for
each norm by the error of the products that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repquant_fx.quantizers.gptq import LEAVES
from repquant_fx.quantizers.uniform import dequantize, quantize

EXPONENTS = (1.0, 0.75, 0.5, 0.25, 0.0)
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the step that clips no channel further
TOKENS, ROWS = 512, 2048  # that the error of the weights is estimated from
PAYS = 0.9  # of the error with a scale for each channel: what must be left of it

Weight = tuple[Tensor, Callable[[Tensor], Tensor], bool]  # (out, in); to nearest; whether GPTQ follows


def balance(
    sample: Tensor, scale: Tensor, zero_point: Tensor, bits: int, weights: Sequence[Weight], finest: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and zero points per channel with the least error of the products, both float64 of shape (D,).

    The error is that of the activation, exact on the sample but for correlations between channels, and that of the
    weights rounded to nearest, less what GPTQ makes up for.

    Args:
        sample: shape (D, N), float32.
        scale, zero_point: with which each channel fills its codes, float64 of shape (D,): what is returned unless
            another exponent has less error by a tenth.
        finest: the smallest scales that make sense, shape (D,).
    """
    x = sample[:, :: max(1, sample.shape[1] // TOKENS)]
    weights = [(weight[:: max(1, len(weight) // ROWS)], nearest, gptq) for weight, nearest, gptq in weights]
    reach = torch.stack([weight.square().sum(0) for weight, _, _ in weights]).sum(0)
    best, least = (scale, zero_point), PAYS * _total(sample, x, scale, zero_point, bits, reach, weights)
    for exponent in EXPONENTS[1:]:
        tried = _clipped(sample, scale, zero_point, bits, exponent, reach, finest)
        error = _total(sample, x, *tried, bits, reach, weights)
        if error < least:
            best, least = tried, error
    return best


def _clipped(
    sample: Tensor, scale: Tensor, zero_point: Tensor, bits: int, exponent: float, reach: Tensor, finest: Tensor
) -> tuple[Tensor, Tensor]:
    """Of steps in the ratios `scale^exponent` those with the least error of the activation, about the same centres."""
    middle = ((1 << bits) - 1) / 2
    centre, ratio = (middle - zero_point) * scale, scale**exponent
    widest = ratio * (scale / ratio).max()
    steps = [torch.maximum(widest * share, finest) for share in CLIPPED]
    tried = [(step, torch.round(middle - centre / step)) for step in steps]
    return min(tried, key=lambda each: _of_activation(sample, each[0], each[1], bits, reach))


def _of_activation(sample: Tensor, scale: Tensor, zero_point: Tensor, bits: int, reach: Tensor) -> float:
    s, z = scale.float()[:, None], zero_point.float()[:, None]
    lost = dequantize(quantize(sample, s, z, bits), s, z).sub_(sample)
    return float((lost.square_().mean(1) * reach).sum())


def _total(sample: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, reach: Tensor,
           weights: Sequence[Weight]) -> float:
    """Of all outputs together: activation and weights, about their means, which biases take up."""
    error, factor = _of_activation(sample, scale, zero_point, bits, reach), scale.float()
    centred = (x - x.mean(1, keepdim=True)) / factor[:, None]
    for weight, nearest, gptq in weights:
        moved = weight * factor
        noise = ((nearest(moved) - moved) @ centred).square().mean(1).sum()
        error += float(noise) * (LEAVES**2 if gptq else 1.0)
    return error
