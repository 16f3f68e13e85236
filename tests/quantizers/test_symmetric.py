"""Grids symmetric about zero, where a range reaches to both sides of it."""

from __future__ import annotations

import pytest
import torch

from repquant_fx import Recipe
from repquant_fx.quantizers.activation import tensor_quantizer


def sample(low: float, up: float) -> torch.Tensor:
    return torch.linspace(low, up, 1001)[None]


@pytest.mark.parametrize("low, up, middle", [
    (-1.0, 3.0, True), (-3.0, 1.0, True), (-0.1, 3.0, False), (-3.0, 0.1, False), (0.0, 2.0, False), (0.0, 0.0, False),
])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_middle_zero_point_where_both_signs_matter(low: float, up: float, middle: bool, bits: int) -> None:
    x = sample(low, up)
    free, symmetric = (
        tensor_quantizer(x, bits, Recipe(activations="minmax", symmetric=each)) for each in (False, True))
    if not middle:
        assert torch.equal(free.scale, symmetric.scale) and torch.equal(free.zero_point, symmetric.zero_point)
        return
    assert float(symmetric.zero_point) == 1 << (bits - 1) != float(free.zero_point)
    assert float((symmetric(x) - x).abs().max()) <= 0.5001 * float(symmetric.scale)  # nothing is cut off
