"""The quantizer behind a norm, where a channel hardly varies."""

from __future__ import annotations

import pytest
import torch

from repquant_fx.quantizers.activation import norm_quantizer
from repquant_fx.recipe import Recipe

BIAS = torch.tensor([0.0, 0.0, 5.0, 5.0, 0.0])
# a constant, nearly one, a constant on a bias, little on a large bias, an ordinary channel
COMPUTED = torch.tensor([1.7, 1.7, 1.7, 0.0, 0.0])
WEIGHTS = [(torch.ones(1, len(BIAS)), torch.Tensor.clone, False)]  # nothing is lost of them
SPREAD = torch.tensor([0.0, 1e-6, 0.0, 1e-3, 2.0])


def sample(count: int = 200) -> torch.Tensor:
    noise = torch.rand(len(BIAS), count, generator=torch.Generator().manual_seed(0))
    return (COMPUTED[:, None] + SPREAD[:, None] * noise) + BIAS[:, None]


@pytest.mark.parametrize("clipping", ["none", "search"])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_not_made_of_rounding(clipping: str, bits: int) -> None:
    x = sample()
    quantizer = norm_quantizer(x, bits, Recipe(clipping=clipping), WEIGHTS, keep_zero=False, bias=BIAS)
    scale, zero_point = quantizer.exact
    computed = (x - BIAS[:, None]).double()
    for sign in (-1, 1):  # as another kernel would round
        other = computed * (1 + sign * 4 * 2.0**-24) + BIAS[:, None]
        steps = [((v / scale[:, None]) + zero_point[:, None])[:3] for v in (other, computed + BIAS[:, None])]
        assert float((steps[0] - steps[1]).abs().max()) <= 2.0**-10 + 1e-9
        assert torch.equal(steps[0].round(), steps[1].round())


def test_a_channel_that_varies_beside_a_large_bias_keeps_its_steps() -> None:
    x = sample()
    scale, _ = norm_quantizer(x, 8, Recipe(clipping="none"), WEIGHTS, keep_zero=False, bias=BIAS).exact
    width = (x.amax(1) - x.amin(1)).double()
    assert float(scale[3]) == pytest.approx(float(width[3]) / 255) and float(scale[4]) == pytest.approx(
        float(width[4]) / 255)
