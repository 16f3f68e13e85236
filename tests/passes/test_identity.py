"""A rewriting that claims a float identity and breaks it stops the compile, and says where."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from compiled import PLAIN
from helpers import Encoder, aten, canonical, images, match, quantized, redraw, sequences
from torch import nn
from torch.fx import GraphModule

from repquant_fx import compile
from repquant_fx.errors import PassError
from repquant_fx.frontends.capture import capture
from repquant_fx.passes import fold_factors
from repquant_fx.passes.base import Pass, attribute, replace_constant, run_passes
from repquant_fx.passes.equalize_layers import EqualizeLayers
from repquant_fx.passes.identity import NodeProbe, changed, deviation
from repquant_fx.passes.normal_form import normalize
from repquant_fx.pipeline import equalize_layers
from repquant_fx.quantizers.reparameterization import ChannelAffine
from repquant_fx.recipe import Recipe

FAST = Recipe(**PLAIN)


class Factor(nn.Module):
    """One factor per channel, as layer scale is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Scale(Pass):
    """Multiplies the first Linear's weight."""

    name = "scale a weight"
    identity = "float"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def run(self, graph_module: GraphModule) -> bool:
        linear = next(iter(graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)))
        replace_constant(graph_module, linear, 1, self.factor * attribute(graph_module, linear.args[1]), "weight")
        return True


def test_a_pass_that_breaks_its_identity_is_named() -> None:
    graph_module, x = canonical(redraw(nn.Linear(8, 4)), sequences()), sequences(2)
    run_passes(graph_module, [Scale(1 + 1e-6)], NodeProbe([x]))
    message = r"pass 'scale a weight' failed after .*canonicalize, .*: it was to leave .* but the output differs by"
    with pytest.raises(PassError, match=message):
        run_passes(graph_module, [Scale(1.01)], NodeProbe([x]))
    run_passes(graph_module, [Scale(1.01)])  # nothing to compare


def test_a_wrong_reparameterization_names_the_linear(vit_graph, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(vit_graph(), FAST, [images(8)])
    # the shift is not undone
    monkeypatch.setattr(ChannelAffine, "rewrite_linear", lambda self, weight, bias: (weight * self.ratio, bias))
    message = r"'reparameterize norms' failed after .*blocks\.0\.attn\.qkv, behind blocks\.0\.norm1, differs by"
    with pytest.raises(PassError, match=message):
        quantized(vit_graph(), FAST, [images(8)])


def test_a_norm_whose_other_reader_sees_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves the segment is compared too: here the norm is not split although the output reads it."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            h = self.norm(x)
            return self.fc(h), h

    graph_module = canonical(redraw(Two()), sequences())
    quantized(graph_module, FAST, [sequences()])
    import helpers

    plan = helpers.match

    def unshared(*args, **kwargs):
        found = plan(*args, **kwargs)
        return replace(found, groups=tuple(replace(group, shared_norm=False) for group in found.groups))

    monkeypatch.setattr(helpers, "match", unshared)
    with pytest.raises(PassError, match="layer_norm differs by"):
        quantized(graph_module, FAST, [sequences()])


def test_a_wrong_equalization_names_the_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrites() -> bool:
        graph_module = canonical(redraw(Encoder()), sequences())
        plan = match(graph_module)
        return equalize_layers(graph_module, plan, [(sequences(),)], Recipe()) is not plan

    assert rewrites()
    monkeypatch.setattr(EqualizeLayers, "_rewrite_columns", lambda *_: None)
    with pytest.raises(PassError, match=r"'equalize layers' failed after .* in blocks\.0\.proj differs by"):
        rewrites()


def test_deviation() -> None:
    x = torch.tensor([1.0, -4.0, math.inf, math.nan])
    assert deviation(x, x.clone()) == 0 and deviation(x, x + 0.04) == pytest.approx(0.01)
    assert deviation(x, torch.zeros(4)) == math.inf and deviation(x, torch.zeros(3)) == math.inf
    assert deviation(torch.zeros(0), torch.zeros(0)) == 0
    assert changed({"a": (x, 3), "b": x}, {"a": (x, 3), "b": x * 1.5}) == "b differs by 50 % of its largest value"
    assert changed({"a": x}, {"a": x}) is None


class Rounded(nn.Module):
    """What it gives hangs on a last bit: every input is halfway between two integers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3.0).round() + x


@pytest.mark.parametrize(("x", "excused"), [(0.5, True), (0.4, False)])
def test_what_rounding_moves_is_no_mistake(x: float, excused: bool) -> None:
    graph_module, probe = canonical(Rounded(), sequences()), NodeProbe([torch.full((2, 3, 8), x)])
    after = probe(graph_module)
    before = {"the output": after["the output"] - 1}
    assert changed(before, after) is not None
    assert (changed(before, after, lambda: probe.shaken(graph_module)) is None) == excused


def test_the_normal_form_is_compared_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = redraw(nn.Sequential(nn.Linear(8, 8), Factor(8))), sequences()
    normalize(capture(model, [x]).graph_module, [x])
    monkeypatch.setattr(fold_factors, "scale_output", lambda weight, bias, scale: (weight, bias))
    with pytest.raises(PassError, match=r"pass 'fold factors' failed after .*the output differs by"):
        normalize(capture(model, [x]).graph_module, [x])
    with pytest.raises(PassError, match=r"pass 'fold factors' failed after .*the output differs by"):
        compile(model, [x], FAST, example_inputs=[x])
