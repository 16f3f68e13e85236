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

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, attribute, replace_constant, run_passes
from repquant_fx.passes.equalize_layers import EqualizeLayers
from repquant_fx.passes.identity import changed, deviation, values
from repquant_fx.pipeline import equalize_layers
from repquant_fx.quantizers.reparameterization import ChannelAffine
from repquant_fx.recipe import Recipe

FAST = Recipe(**PLAIN)


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


def output_of(x: torch.Tensor):
    return lambda graph_module: values(graph_module, {"the output": graph_module.graph.output_node()}, [x])


def test_a_pass_that_breaks_its_identity_is_named() -> None:
    graph_module, x = canonical(redraw(nn.Linear(8, 4)), sequences()), sequences(2)
    run_passes(graph_module, [Scale(1 + 1e-6)], output_of(x))
    message = r"pass 'scale a weight' failed after .*canonicalize, .*: it was to leave .* but the output differs by"
    with pytest.raises(PassError, match=message):
        run_passes(graph_module, [Scale(1.01)], output_of(x))
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
