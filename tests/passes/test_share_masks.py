"""Masks as additions: bit for bit the same, and small."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Function, aten, canonical, count, output
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.passes.base import run_passes
from repquant_fx.passes.share_masks import SWALLOWS, ShareMasks

LOWEST = torch.finfo(torch.float32).min


def scores(count: int = 4) -> Tensor:
    return 30 * torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def mask(x: Tensor, low: float = LOWEST) -> Tensor:
    """True where masked; one for all heads, the first row of it open nowhere unless that gives no numbers."""
    hidden = (x[:, :1] > 10) & (torch.arange(5) > 0)
    return hidden if math.isinf(low) else hidden | (torch.arange(5)[:, None] == 0)


@pytest.mark.parametrize("low", [LOWEST, -math.inf, -1e32])
@pytest.mark.parametrize("form", ["masked_fill", "where", "where reversed"])
def test_same_bits(form: str, low: float) -> None:
    def masked(x: Tensor) -> Tensor:
        if form == "masked_fill":
            return torch.softmax(x.masked_fill(mask(x, low), low), -1)
        if form == "where":
            return torch.softmax(torch.where(mask(x, low), low, x), -1)
        return torch.softmax(torch.where(~mask(x, low), x, low), -1)

    graph_module = canonical(Function(masked), scores())
    expected = output(graph_module, scores())
    result = run_passes(graph_module, [ShareMasks()])
    assert count(result, aten.masked_fill.Scalar) == 0
    (chosen,) = [n for n in result.graph.nodes if n.target is aten.where.self]
    assert chosen.meta["val"].shape[1] == 1  # no heads
    assert torch.equal(output(result, scores()), expected)


@given(
    st.floats(width=32, min_value=-(2.0**70), max_value=2.0**70),
    st.floats(width=32, max_value=-(2.0**100), allow_nan=False),
)
def test_low_numbers_swallow_scores(score: float, low: float) -> None:
    assert SWALLOWS <= -2.0**99
    assert torch.equal(torch.tensor(score) + torch.tensor(low), torch.tensor(low))


@pytest.mark.parametrize("function", [
    lambda x: torch.softmax(x.masked_fill(mask(x), -1e4), -1),  # not low enough
    lambda x: x.masked_fill(mask(x), LOWEST),  # no Softmax: what is filled in is seen
    lambda x: torch.softmax(x.masked_fill(x > 10, LOWEST), -1),  # the mask is as large as the scores
], ids=["not low", "no softmax", "full mask"])
def test_left_alone(function) -> None:
    graph_module = canonical(Function(function), scores())
    assert not ShareMasks().run(graph_module)
