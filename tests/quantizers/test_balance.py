"""How much of the channels' differences moves into the weights: never more error than all, and less where it pays."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.quantizers.activation import norm_quantizer
from repquant_fx.quantizers.balance import balance
from repquant_fx.quantizers.uniform import fake_quantize, parameters_from_range
from repquant_fx.quantizers.weight import chosen_grid
from repquant_fx.recipe import Recipe


def to_nearest(bits: int, weight: Tensor) -> Tensor:
    return chosen_grid(weight, bits, Recipe()).values(weight)


def layer(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """A sample (D, N), with channels up to e^(2 spread) apart, and a weight whose columns do not make up for it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 600, generator=generator) * torch.exp(spread * torch.randn(24, 1, generator=generator))
    return x + torch.randn(24, 1, generator=generator), torch.randn(16, 24, generator=generator)


def error(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, abits: int, wbits: int) -> float:
    """Of the product as it will be computed, about its mean: the scales are in the weight when it is rounded."""
    s = scale.float()
    quantized = fake_quantize(x, s[:, None], zero_point.float()[:, None], abits) / s[:, None]
    lost = to_nearest(wbits, weight * s) @ quantized - weight @ x
    return float((lost - lost.mean(1, keepdim=True)).square().mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.7, 1.5]), st.sampled_from([3, 4, 8]), st.sampled_from([3, 4, 8]))
def test_it_does_no_harm(seed: int, spread: float, wbits: int, abits: int) -> None:
    x, weight = layer(seed, spread)
    before = parameters_from_range(x.amin(1).double(), x.amax(1).double(), abits, include_zero=False)
    after = balance(x, *before, abits, [(weight, partial(to_nearest, wbits), False)], torch.full((24,), 1e-8))
    assert after[0].dtype == after[1].dtype == torch.float64 and bool((after[0] > 0).all())
    assert torch.equal(after[1], after[1].round())
    assert error(x, weight, *after, abits, wbits) <= 1.1 * error(x, weight, *before, abits, wbits)


def test_narrow_weights_get_less_of_it_and_wide_ones_all() -> None:
    x, weight = layer(0, 1.2)
    before = parameters_from_range(x.amin(1).double(), x.amax(1).double(), 8, include_zero=False)
    spreads, errors = [], []
    for wbits in (3, 8):
        after = balance(x, *before, 8, [(weight, partial(to_nearest, wbits), False)], torch.full((24,), 1e-8))
        spreads.append(float(after[0].log().std()))
        errors.append((error(x, weight, *after, 8, wbits), error(x, weight, *before, 8, wbits)))
    assert spreads[0] < 0.7 * spreads[1] <= float(before[0].log().std()) + 1e-9
    assert errors[0][0] < 0.7 * errors[0][1]


@pytest.mark.parametrize("norm", ["reparameterize", "channelwise"])
def test_scales_that_stay_in_the_file_are_each_channels_own(norm: str) -> None:
    x, weight = layer(1, 1.2)
    weights = [(weight, partial(to_nearest, 3), False)]
    own, other = (norm_quantizer(x, 8, Recipe(norm=norm, balance=each), weights, keep_zero=False).exact[0]
                  for each in (False, True))
    assert torch.equal(own, other) == (norm == "channelwise")
