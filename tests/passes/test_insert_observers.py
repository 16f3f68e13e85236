"""Insert observers: a slot at each site, the outputs unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import canonical, images, match, observed, output, redraw, sequences
from torch import Tensor, nn

from repquant_fx.passes.base import run_passes
from repquant_fx.passes.insert_observers import CHANNEL_SAMPLE, SLOTS, TENSOR_SAMPLE, InsertObservers
from repquant_fx.passes.slots import slot_module, slot_of
from repquant_fx.quantizers.observers import Observer


@pytest.mark.parametrize("name", ["vit_graph", "swin_graph", "encoder_graph"])
def test_outputs_are_unchanged_and_consumers_read_slots(name: str, request: pytest.FixtureRequest) -> None:
    graph_module = request.getfixturevalue(name)()
    x = sequences() if name == "encoder_graph" else images()
    before = output(graph_module, x)
    plan = match(graph_module)
    run_passes(graph_module, [InsertObservers(plan, 1)])
    assert torch.equal(output(graph_module, x), before)
    sites = [s for g in plan.groups for s in g.sites]
    assert len(list(graph_module.get_submodule(SLOTS).children())) == len(sites)
    for site in sites:
        slot = slot_of(graph_module, site)
        assert slot.args == (site.value,) and set(slot.users) == set(site.consumers)
        assert not set(site.value.users) & set(site.consumers)
        assert slot.meta["val"].shape == site.value.meta["val"].shape


def test_norm_sites_are_observed_by_channel(encoder_graph) -> None:
    graph_module = encoder_graph()
    plan = observed(graph_module, list(sequences().split(8)))
    for group in plan.groups:
        for site in group.sites:
            observer = slot_module(graph_module, site)
            assert isinstance(observer, Observer) and observer.channels == (site.role == "norm")
            assert observer.capacity == (CHANNEL_SAMPLE if site.role == "norm" else TENSOR_SAMPLE)
            assert observer.sample().shape[0] == (site.value.meta["val"].shape[-1] if site.role == "norm" else 1)
            attention = any(s.role == "softmax" for s in group.sites)
            assert (observer.leading > 0) == attention
            if attention:
                assert observer.whole().shape[1:] == site.value.meta["val"].shape[1:]


def test_the_graph_it_was_copied_from_is_left_alone(encoder_graph) -> None:
    original = encoder_graph()
    text = str(original.graph)
    graph_module = copy.deepcopy(original)
    observed(graph_module, [sequences()])
    assert str(original.graph) == text and not hasattr(original, SLOTS)


def test_a_product_of_a_value_with_itself() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.mix(x))
            return h @ h

    x = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    graph_module = canonical(redraw(Square()), x)
    before = output(graph_module, x)
    plan = observed(graph_module, [x])
    product = next(g for g in plan.groups if g.kind == "matmul")
    assert [list(product.consumers[0].args)] == [[slot_of(graph_module, s) for s in product.sites]]
    assert torch.equal(output(graph_module, x), before)


def test_nothing_to_observe() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    graph_module = canonical(Plain(), sequences())
    assert not InsertObservers(match(graph_module), 1)(graph_module).modified
