"""Cross-layer equalization: an identity in float, level channels afterwards, and only where every reader can undo it.
"""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from helpers import Encoder, aten, canonical, match, output, quantized, redraw, relative, sequences, values_at
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.parity import sqnr
from repquant_fx.passes.equalize_layers import channel_rows, find_equalizable
from repquant_fx.passes.match_sites import Plan
from repquant_fx.pipeline import equalize_layers
from repquant_fx.recipe import EQUALIZE, Recipe


class Decoder(nn.Module):
    """Rotary, grouped-query attention with norms on q and k where asked for; a gated MLP without biases."""

    def __init__(
        self, *, rotary: bool = True, qk_norm: bool = False, width: int = 8, heads: int = 4, groups: int = 2
    ) -> None:
        super().__init__()
        size = 4
        self.q, self.k, self.v = (nn.Linear(width, n * size) for n in (heads, groups, groups))
        self.o = nn.Linear(heads * size, width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(size) if qk_norm else nn.Identity() for _ in range(2))
        self.gate, self.up, self.down = (
            nn.Linear(width, 16, bias=False),
            nn.Linear(width, 16, bias=False),
            nn.Linear(16, width, bias=False),
        )
        angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.rotary = rotary
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        return x * self.cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * self.sin if self.rotary else x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.turn(self.q_norm(q)), self.turn(self.k_norm(k))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Relu(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), act, nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


def spread_rows(model: nn.Module, *names: str, ratio: float = 100.0) -> nn.Module:
    """Give the output channels of some layers ranges up to `ratio` apart; the function changes with them."""
    with torch.no_grad():
        for seed, name in enumerate(names):
            layer = model.get_submodule(name)
            powers = torch.rand(len(layer.weight), generator=torch.Generator().manual_seed(seed)) * math.log(ratio)
            layer.weight.mul_(torch.exp(powers - powers.mean()).reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return model


MODELS = {
    "attention": (
        lambda: spread_rows(redraw(Encoder()), "blocks.0.q", "blocks.0.v"),
        {"values": 2, "query_key": 2, "linear": 0, "keys": 1},
    ),
    "without biases": (
        lambda: spread_rows(redraw(Encoder(bias=False)), "blocks.0.v"),
        {"values": 2, "query_key": 2, "linear": 0, "keys": 1},
    ),
    "causal": (
        lambda: spread_rows(redraw(Encoder(causal=True)), "blocks.0.v"),
        {"values": 2, "query_key": 2, "linear": 0, "keys": 1},
    ),
    "decoder": (
        lambda: spread_rows(redraw(Decoder()), "k", "v", "up"),
        {"values": 2, "query_key": 2, "linear": 1, "keys": 0},
    ),
    "no rotary": (
        lambda: spread_rows(redraw(Decoder(rotary=False)), "k", "v", "up"),
        {"values": 2, "query_key": 2, "linear": 1, "keys": 1},
    ),
    "norms on q and k": (
        lambda: spread_rows(redraw(Decoder(qk_norm=True)), "k_norm", "v"),
        {"values": 2, "query_key": 2, "linear": 1, "keys": 0},
    ),
    "norms without rotary": (
        lambda: spread_rows(redraw(Decoder(qk_norm=True, rotary=False)), "k_norm", "v"),
        {"values": 2, "query_key": 2, "linear": 1, "keys": 0},
    ),
    "relu": (
        lambda: spread_rows(redraw(Relu(nn.ReLU())), "fc1"),
        {"values": 0, "query_key": 0, "linear": 1, "keys": 0},
    ),
    "gelu": (lambda: redraw(Relu(nn.GELU())), {"values": 0, "query_key": 0, "linear": 0, "keys": 0}),
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, GraphModule]:
    """A model of `MODELS` and its canonical graph; neither is to be changed."""
    model = MODELS[name][0]()
    return model, canonical(model, sequences())


def equalized(graph_module: GraphModule, kinds: tuple[str, ...] = EQUALIZE) -> tuple[GraphModule, Plan, bool]:
    plan = match(graph_module)
    found = equalize_layers(graph_module, plan, [(b,) for b in sequences(64).split(16)], Recipe(equalize=kinds))
    return graph_module, found, found is not plan


@pytest.mark.parametrize("name, kind", [
    pytest.param(name, kind, marks=() if kind == "all" or name in ("attention", "decoder") else pytest.mark.slow)
    for name in MODELS for kind in [*EQUALIZE, "all"]
])
def test_the_outputs_do_not_change(name: str, kind: str) -> None:
    model, before = captured(name)
    kinds = EQUALIZE if kind == "all" else (kind,)
    found = find_equalizable(before, match(before), kinds)
    counted = [k for k in kinds if k != "keys" or kind == "keys"]  # the keys of `query_key` are those of `keys`
    assert len(found.sites) == sum(MODELS[name][1][k] for k in counted)
    graph_module, _, changed = equalized(copy.deepcopy(before), kinds)
    assert changed is bool(found.sites)
    weights = before.state_dict()
    moved = [n for n, p in graph_module.state_dict().items() if n not in weights or not torch.equal(p, weights[n])]
    assert bool(moved) is changed  # a layer may gain a bias
    assert relative(output(graph_module, sequences()), output(model, sequences())) < 1e-5


def test_keys_lose_what_they_have_in_common_and_queries_keep_everything() -> None:
    """One range holds them better; neither has another factor than before."""
    model = redraw(Encoder())
    with torch.no_grad():
        model.blocks[0].k.bias.add_(torch.linspace(-40, 40, 16))  # type: ignore[union-attr, operator]
    before = canonical(model, sequences())
    graph_module, plan, _ = equalized(copy.deepcopy(before), ("keys",))
    sites = {s.name: s for g in plan.groups for s in g.sites if s.name.endswith(("/query", "/key"))}
    assert len(sites) == 2
    old = dict(zip(sites, values_at(before, [n for n in before.graph.nodes for s in sites.values()
                                             if n.name == s.value.name], sequences(64))))
    new = dict(zip(sites, values_at(graph_module, [s.value for s in sites.values()], sequences(64))))
    query, key = sites
    torch.testing.assert_close(new[query], old[query])
    shift = new[key] - old[key]
    torch.testing.assert_close(shift, shift[:1, ..., :1].expand_as(shift), rtol=1e-4, atol=1e-4)
    assert float(new[key].abs().max()) < 0.3 * float(old[key].abs().max())


def test_an_rms_norm_takes_no_shift() -> None:
    """It has no bias: keys behind one get factors alone, and are levelled for what they then are."""
    graph_module = canonical(redraw(Decoder(qk_norm=True, rotary=False)), sequences())
    found = find_equalizable(graph_module, match(graph_module))
    rows = [labels for node, labels in found.rows.items() if node.target is aten.rms_norm.default]
    assert len(rows) == 2 and not found.shiftable & set(torch.cat(rows).tolist()) and found.shiftable


def ranges(graph_module: GraphModule, plan: Plan) -> dict[str, float]:
    """How far apart the channels of each equalizable site are: the largest range over the smallest."""
    found = find_equalizable(graph_module, plan)
    sites = {s.name: s for g in plan.groups for s in g.sites if s.name in found.sites}
    values = values_at(graph_module, [s.value for s in sites.values()], sequences(64))
    spread = {}
    for name, value in zip(sites, values):
        reach = channel_rows(value, found.sites[name]).abs().amax(0)
        spread[name] = float(reach.max() / reach[reach > 0].min())  # a channel that ReLU keeps at zero has no range
    return spread


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gelu"])
def test_channels_are_level_afterwards(name: str) -> None:
    _, graph_module = captured(name)
    before = ranges(graph_module, match(graph_module))
    after = ranges(*equalized(copy.deepcopy(graph_module))[:2])
    assert after.keys() == before.keys()
    assert sum(math.log(v) for v in after.values()) < 0.7 * sum(math.log(v) for v in before.values())
    for site in after:
        if "value" in site or "down" in site or "fc2" in site:
            assert after[site] < 4, (site, before[site])


def test_heads_merged_with_the_batch() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).reshape(3, b * 2, t, 4).unbind(0)
            h = torch.softmax(q @ k.transpose(1, 2), -1) @ v
            return self.o(h.reshape(b, 2, t, 4).transpose(1, 2).reshape(b, t, 8))

    model = spread_rows(redraw(Merged()), "qkv")
    graph_module, plan, changed = equalized(canonical(model, sequences()))  # batches of 16, captured with 2
    assert changed and relative(output(graph_module, sequences()), output(model, sequences())) < 1e-5
    found = find_equalizable(graph_module, plan)
    assert [list(p.shape) for n, p in found.sites.items() if n.endswith("/value")] == [[2, 1, 4]]


def test_the_mean_of_keys_and_values_goes_too() -> None:
    model = redraw(Encoder())
    assert isinstance(model, Encoder)
    with torch.no_grad():
        model.blocks[0].k.bias.add_(20.0)
        model.blocks[0].v.bias.add_(-30.0)
    graph_module, plan, _ = equalized(canonical(model, sequences()))
    for site in (s for g in plan.groups for s in g.sites if s.name.endswith(("/key", "/value"))):
        (value,) = values_at(graph_module, [site.value], sequences())
        assert float(value.mean().abs()) < 0.2 * float(value.abs().max())
    assert relative(output(graph_module, sequences()), output(model, sequences())) < 1e-4


def test_planted_variation_of_values_is_undone() -> None:
    """Without equalization one scale must serve channels far apart; with it the plant does not matter."""
    plain = redraw(Encoder(bias=False))
    model = copy.deepcopy(plain)
    block = model.blocks[0]  # type: ignore[union-attr]
    factors = torch.exp(torch.linspace(-3, 3, 16))
    with torch.no_grad():
        block.v.weight.mul_(factors[:, None])
        block.proj.weight.div_(factors)
    x = sequences(64)
    expected = output(plain, x)

    def quality(source: nn.Module, kinds: tuple[str, ...]) -> float:
        graph_module = canonical(source, sequences())
        recipe = Recipe(wbits=8, abits=4, equalize=kinds, correction=False)
        equalize_layers(graph_module, match(graph_module), [(x,)], recipe)
        return sqnr(output(quantized(graph_module, recipe, list(x.split(16))).graph_module, x), expected)

    assert quality(model, ()) < quality(plain, ()) - 3
    assert abs(quality(model, ("values",)) - quality(plain, ("values",))) < 1.0


def test_values_that_something_else_reads_are_left_alone() -> None:
    class Leak(Encoder):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + self.blocks[0].v(self.embed(x)).mean()  # type: ignore[operator, union-attr]

    class Inside(nn.Module):
        """What reads the values is not linear."""

        def __init__(self) -> None:
            super().__init__()
            self.v, self.o = nn.Linear(8, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            v = self.v(x)
            return self.o(torch.softmax(x @ x.transpose(1, 2), -1) @ v), v.sigmoid()

    graph_module = canonical(redraw(Inside()), sequences())
    assert not find_equalizable(graph_module, match(graph_module)).rows
    model = redraw(Leak())  # the layer runs twice: each run has its own constants, and only the first can take part
    graph_module, _, changed = equalized(canonical(model, sequences()))
    assert changed and relative(output(graph_module, sequences()), output(model, sequences())) < 1e-5


def test_a_dead_channel_gets_a_finite_factor() -> None:
    model = redraw(Encoder())
    with torch.no_grad():
        model.blocks[0].v.weight[3] = 0.0  # type: ignore[union-attr]
        model.blocks[0].v.bias[3] = 0.0  # type: ignore[union-attr]
    graph_module, _, _ = equalized(canonical(model, sequences()))
    assert all(bool(torch.isfinite(p).all()) for p in graph_module.state_dict().values())
    assert relative(output(graph_module, sequences()), output(model, sequences())) < 1e-5


def test_nothing_to_do_without_data_or_kinds() -> None:
    graph_module = canonical(redraw(Encoder()), sequences())
    plan = match(graph_module)
    assert equalize_layers(graph_module, plan, [], Recipe()) is plan
    assert equalize_layers(graph_module, plan, [(sequences(),)], Recipe(equalize=())) is plan
