"""Calibrate: each role gets its quantizer, and no range is worse than the extremes."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    calibrate,
    canonical,
    images,
    match,
    norm_groups,
    observed,
    output,
    quantized,
    redraw,
    relative,
    sequences,
    values_at,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.errors import PassError
from repquant_fx.passes.base import attribute, run_passes
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.match_sites import Plan
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.passes.slots import observer, slot_module
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.recipe import Recipe


def calibrated(graph_module: GraphModule, recipe: Recipe, x: Tensor) -> tuple[Plan, dict[str, Tensor]]:
    """Calibrate every group, each on float data; returns the samples too."""
    plan = observed(graph_module, list(x.split(8)), recipe)
    samples = {s.name: observer(graph_module, s).sample() for g in plan.groups for s in g.sites}
    calibrate(graph_module, recipe, *plan.groups)
    return plan, samples


RECIPES = [
    {},
    {"clipping": "adam"},
    {"clipping": "none"},
    {"norm": "layerwise"},
    {"norm": "channelwise"},
    {"softmax": "log2"},
    {"softmax": "uniform"},
    {"softmax_scale": "percentile"},
    {"activations": "percentile"},
    {"activations": "minmax"},
    {"norm": "smooth"},
]


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_roles(encoder_graph, changes: dict[str, str]) -> None:
    graph_module, recipe = encoder_graph(), Recipe(wbits=4, abits=4, **changes)  # type: ignore[arg-type]
    plan, _ = calibrated(graph_module, recipe, sequences())
    for group in plan.groups:
        for site in group.sites:
            module = slot_module(graph_module, site)
            if site.role == "softmax":
                assert isinstance(module, LogQuantizer) and module.steps == (1 if recipe.softmax == "log2" else 2)
                assert float(module.scale) > 0
                continue
            assert isinstance(module, UniformQuantizer) and module.bits == site.bits
            assert bool((module.scale > 0).all()) and bool((module.zero_point == module.zero_point.round()).all())
            if site.role == "norm" and recipe.norm != "layerwise":
                assert module.scale.shape == module.zero_point.shape == site.value.meta["val"].shape[-1:]
            else:  # a zero point that can be stored
                assert module.scale.ndim == 0 and 0 <= float(module.zero_point) <= (1 << site.bits) - 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clipping", ["search", "adam"])
def test_clipping_is_never_worse_than_the_extremes(encoder_graph, bits: int, clipping: str) -> None:
    errors = {}
    for name in ("none", clipping):
        graph_module = encoder_graph()
        plan, samples = calibrated(graph_module, Recipe(wbits=4, abits=bits, clipping=name, balance=False), sequences())
        errors[name] = torch.stack([
            (slot_module(graph_module, s)(samples[s.name].T) - samples[s.name].T).square().mean(0)
            for g in norm_groups(plan) for s in g.sites])
    assert bool((errors[clipping] <= errors["none"] * (1 + 1e-4) + 1e-12).all())
    if bits <= 4:
        assert errors[clipping].sum() < 0.97 * errors["none"].sum()


def test_without_clipping_the_extremes_are_codes(encoder_graph) -> None:
    graph_module = encoder_graph()
    plan, samples = calibrated(graph_module, Recipe(abits=4, clipping="none"), sequences())
    for group in norm_groups(plan):
        for site in group.sites:
            module, sample = slot_module(graph_module, site), samples[site.name]
            assert isinstance(module, UniformQuantizer)
            torch.testing.assert_close(module.scale, (sample.amax(1) - sample.amin(1)) / 15)
            assert bool((module.codes(sample.T).amax(0) - module.codes(sample.T).amin(0) >= 14).all())


def test_minmax_covers_and_mse_beats_it(encoder_graph) -> None:
    errors = {}
    for name in ("minmax", "mse", "percentile"):
        graph_module = encoder_graph()
        plan, samples = calibrated(graph_module, Recipe(abits=4, activations=name, percentile=99.0), sequences())
        sites = [s for g in plan.groups for s in g.sites if s.role == "plain"]
        errors[name] = [
            float((slot_module(graph_module, s)(samples[s.name]) - samples[s.name]).square().mean()) for s in sites
        ]
        ranges = [float(slot_module(graph_module, s).scale) for s in sites]
        if name == "minmax":
            widest = ranges
    assert all(m <= x * (1 + 1e-5) for m, x in zip(errors["mse"], errors["minmax"]))
    assert sum(errors["mse"]) < 0.97 * sum(errors["minmax"])
    assert all(p <= w for p, w in zip(ranges, widest)) and ranges != widest  # the percentile cuts


def test_a_norm_with_two_sites_has_one_quantizer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.a(h[:, 0]) + self.b(h.mean(1))

    graph_module = canonical(redraw(Two()), sequences())
    plan, _ = calibrated(graph_module, Recipe(abits=4), sequences())
    (group,) = plan.groups
    first, second = (slot_module(graph_module, s) for s in group.sites)
    assert first is not second and torch.equal(first.scale, second.scale)  # type: ignore[arg-type]
    assert torch.equal(first.zero_point, second.zero_point)  # type: ignore[arg-type]


def test_softmax_scale_by_the_product(encoder_graph) -> None:
    """The scale chosen for the product's error gives no larger error there than the percentile's."""
    errors = {}
    for name in ("output", "percentile"):
        graph_module, recipe = encoder_graph(), Recipe(abits=3, softmax_scale=name)
        plan = observed(graph_module, list(sequences().split(8)), recipe)
        group = next(g for g in plan.groups if g.softmax is not None)
        a, v = (observer(graph_module, s).whole() for s in group.sites)
        calibrate(graph_module, recipe, group)
        qa, qv = (slot_module(graph_module, s) for s in group.sites)
        errors[name] = float((qa(a) @ qv(v) - a @ qv(v)).square().mean())
    assert errors["output"] <= errors["percentile"] * (1 + 1e-6)


def test_dead_channels_and_constants() -> None:
    """A channel that is constant has no range, and no division by zero."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    redraw(model)
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[0].bias[2], model[0].bias[3] = 0.0, 5.0
    x = sequences()
    graph_module = canonical(model, x)
    for clipping in ("search", "adam", "none"):
        run = quantized(graph_module, Recipe(wbits=8, abits=4, clipping=clipping), list(x.split(8)))
        with torch.no_grad():
            found = run.graph_module(x)
        assert bool(torch.isfinite(found).all())
        assert float((found - graph_module(x)).square().mean() / graph_module(x).square().mean()) < 0.02


def test_mistakes_in_order_are_named(vit_graph) -> None:
    graph_module, recipe = vit_graph(), Recipe()
    plan = match(graph_module, recipe)
    group = plan.groups[0]
    with pytest.raises(PassError, match="has no observer; run `insert observers` first"):
        calibrate(graph_module, recipe, group)
    run_passes(graph_module, [InsertObservers(plan, 1)])
    with pytest.raises(PassError, match="an observer has seen no data"):
        calibrate(graph_module, recipe, group)
    slot_module(graph_module, group.sites[0]).start(1)  # type: ignore[operator]
    graph_module(images())
    calibrate(graph_module, recipe, group)
    with pytest.raises(PassError, match=r"patch_embed\.proj/input holds a UniformQuantizer, not an observer"):
        calibrate(graph_module, recipe, group)


def test_smoothing_shares_the_spread_between_activations_and_weights() -> None:
    """SmoothQuant: afterwards `max|X_j|` and `max|W_j|` are equal up to one factor for all channels."""
    model = redraw(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.exp(torch.linspace(-3, 3, 8)))
    graph_module, x = canonical(model, sequences()), sequences(64)
    recipe = Recipe(norm="smooth", activations="minmax")
    plan, _ = calibrated(graph_module, recipe, x)
    (group,) = norm_groups(plan)
    module = slot_module(graph_module, group.sites[0])
    assert isinstance(module, UniformQuantizer) and len(module.zero_point.unique()) == 1
    before = output(graph_module, x)
    run_passes(graph_module, [ReparameterizeNorms(group)])
    (value,) = values_at(graph_module, [group.sites[0].value], x)
    weight = attribute(graph_module, group.consumers[0].args[1])  # type: ignore[arg-type]
    ratio = value.reshape(-1, 8).abs().amax(0) / weight.abs().amax(0)
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(8), rtol=1e-4, atol=0)
    assert relative(output(graph_module, x), before) < 1e-5
