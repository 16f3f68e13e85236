"""Integer products without VNNI: an exact model, what it does to full-range weights, and that 7 bits are safe."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled, inputs
from hypothesis import given
from hypothesis import strategies as st

from repquant_fx.fit import run_saturating
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.parity import sqnr
from repquant_fx.quantizers.saturation import LEAST, MOST, can_saturate, saturating_product


def by_hand(activations: list[int], weights: list[int]) -> int:
    """One sum, in Python's integers."""
    products = [a * w for a, w in zip(activations, weights)] + [0]
    pairs = (products[k] + products[k + 1] for k in range(0, len(weights), 2))
    return sum(max(LEAST, min(MOST, pair)) for pair in pairs)


def test_a_pair_of_largest_products_saturates() -> None:
    a = torch.tensor([[255, 255, 255, 0]], dtype=torch.uint8)
    w = torch.tensor([[127, 127, 127, 127], [-128, -128, 1, 1], [127, -127, 127, 0]], dtype=torch.int8)
    assert saturating_product(a, w).tolist() == [[MOST + 255 * 127, LEAST + 255, 255 * 127]]


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_it_is_what_python_computes(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, (2, 3, k), generator=generator)
    w = torch.randint(-128, 128, (4, k), generator=generator)
    found = saturating_product(a, w)
    assert found.shape == (2, 3, 4)
    assert found[1, 2].tolist() == [by_hand(a[1, 2].tolist(), row.tolist()) for row in w]


@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_what_cannot_saturate_does_not(bits: int, activation_bits: int, seed: int) -> None:
    generator, top = torch.Generator().manual_seed(seed), 2**activation_bits - 1
    a = top * torch.randint(0, 2, (16, 6), generator=generator)  # the extremes are the worst
    w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 6), generator=generator)
    same = (saturating_product(a, w) == a @ w.T).all(0)
    assert bool((same | can_saturate(w, top)).all())
    assert bits == 8 or not can_saturate(w, top).any()


def test_the_bound_is_sharp() -> None:
    rows = torch.tensor([[127, 0, 1], [127, 0, 2], [-64, -64, -64], [64, 65, 0], [-128, 1, 0], [-128, 0, -1]])
    assert can_saturate(rows).tolist() == [False, True, False, True, False, True]
    assert not can_saturate(rows[:, :1]).any() and not can_saturate(rows, 127).any()


@pytest.mark.parametrize("wbits, safe", [(8, False), (7, True)])
def test_full_range_weights_go_wrong_and_the_profile_does_not(wbits: int, safe: bool) -> None:
    """A whole model on a processor without VNNI: the FX reference with the sums that such a processor gets."""
    model, x = compiled("vit", wbits, 8), inputs("vit", 4, seed=9)
    graph_module = model.graph_module
    (found,) = run_saturating(graph_module, x)
    decibels = sqnr(found, tensors_in(graph_module(x))[0])
    assert (decibels == float("inf")) == safe
    assert safe or decibels < 30
