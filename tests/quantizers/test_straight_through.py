"""Quantizers that learn: they start and end as ordinary ones, bit for bit, and gradients go where they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.quantizers.gptq import QuantizedWeight, round_to_nearest, weight_grid
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.straight_through import LearnedLog, LearnedUniform, LearnedWeight, code_window
from repquant_fx.quantizers.uniform import parameters_from_range
from repquant_fx.quantizers.weight import fills_container

BITS = st.integers(2, 8)


def uniform(x: Tensor, bits: int, share: float = 0.8) -> UniformQuantizer:
    return UniformQuantizer(*parameters_from_range(x.min() * share, x.max() * share, bits, include_zero=True), bits)


def rounded(weight: Tensor, bits: int) -> QuantizedWeight:
    return round_to_nearest(weight, weight_grid(weight, bits, symmetric=fills_container(bits)))


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(0, 2**31), st.floats(0.01, 100))
def test_a_learned_quantizer_starts_as_the_one_it_comes_from(bits: int, seed: int, size: float) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * size
    quantizer = uniform(x, bits)
    learned = LearnedUniform(quantizer)
    assert torch.equal(learned(x), quantizer(x)) and torch.equal(learned.learned()(x), quantizer(x))


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(0, 2**31), st.floats(-1, 1), st.floats(-3, 3))
def test_and_ends_as_the_one_it_becomes(bits: int, seed: int, growth: float, shift: float) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    learned = LearnedUniform(uniform(x, bits))
    with torch.no_grad():
        learned.growth += growth
        learned.zero_point += shift
    became = learned.learned()
    assert torch.equal(learned(x), became(x))
    assert 0 <= float(became.zero_point) <= (1 << bits) - 1 and float(became.zero_point).is_integer()


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(0, 2**31), st.booleans())
def test_a_learned_weight_keeps_its_codes_at_first(bits: int, seed: int, with_latent: bool) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    codes = rounded(weight, bits)
    learned = LearnedWeight(codes, weight if with_latent else None, bits)
    assert torch.equal(learned.learned().codes, codes.codes) and torch.equal(learned.learned().scale, codes.scale)
    assert torch.equal(learned(), codes.dequantize())


@settings(deadline=None, max_examples=40)
@given(BITS, st.integers(0, 2**31))
def test_codes_stay_in_a_window_of_their_bits(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = rounded(torch.randn(5, 12, generator=generator), bits)
    learned = LearnedWeight(codes, None, bits)
    with torch.no_grad():
        learned.codes += 300 * torch.randn(5, 12, generator=generator)
    became = learned.learned()
    low, up = code_window(codes.codes, bits)
    assert bool((up - low < 1 << bits).all()) and bool((low <= 0).all()) and bool((up >= 0).all())
    assert bool((became.codes >= low[:, None]).all()) and bool((became.codes <= up[:, None]).all())
    assert torch.equal(learned(), became.dequantize())


def test_a_value_outside_the_range_moves_the_bounds_alone() -> None:
    learned = LearnedUniform(UniformQuantizer(torch.tensor(0.1), torch.tensor(8.0), 4))
    x = torch.tensor([0.33, 5.0], requires_grad=True)
    learned(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0]
    assert float(learned.growth.grad) == pytest.approx(0.1 * (3 - 3.3) + 0.7, abs=1e-5)  # type: ignore[arg-type]


def test_a_masked_probability_gets_no_gradient() -> None:
    learned = LearnedLog(LogQuantizer(1.0, 4, 2))
    x = torch.tensor([0.5, 0.0, 0.1], requires_grad=True)
    value = learned(x)
    value.sum().backward()
    assert torch.equal(value.detach(), LogQuantizer(1.0, 4, 2)(x.detach()))
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 1.0]
