"""Where factors and shifts go: what the labels claim is checked by computing both sides."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Function, aten, canonical
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.frontends.capture import capture
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.channel_flow import (
    FIXED,
    PADDING,
    ChannelFlow,
    Ties,
    constant_over,
    leads_to_softmax,
    origin,
    softmax_behind,
)
from repquant_fx.passes.operators import MATMULS

INDEX = torch.tensor([2, 0, 1])
COS, SIN = torch.rand(6, 4, 1), torch.rand(6, 4, 1)

# functions of (batch, 6, 4, 5) that a factor and a shift pass
AFFINE = {
    "reshape tokens": lambda x: x.reshape(-1, 6, 4, 5),
    "flatten tokens": lambda x: x.flatten(1, 2),
    "unflatten tokens": lambda x: x.unflatten(1, (2, 3)),
    "merge batch": lambda x: x.reshape(-1, 5),
    "windows": lambda x: x.reshape(-1, 2, 3, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 5),
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "split heads after channels first": lambda x: x.permute(0, 3, 1, 2).reshape(-1, 5, 24),
    "transpose": lambda x: x.transpose(1, 3),
    "roll": lambda x: torch.roll(x, (1, -2), (1, 2)),
    "slice": lambda x: x[:, 1:4],
    "select twice": lambda x: x[:, 0, -1],
    "mean": lambda x: x.mean(1),
    "mean of both": lambda x: x.mean((1, 2)),
    "mean kept": lambda x: x.mean((1, 2), keepdim=True),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "flip": lambda x: x.flip(1),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1, -1),
    "split": lambda x: x.split(2, 1)[1],
    "split with sizes": lambda x: x.split([1, 5], 1)[1],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "index": lambda x: x[:, INDEX],
    "two indices": lambda x: x[:, INDEX, INDEX],
    "index select": lambda x: x.index_select(1, INDEX),
    "computed index": lambda x: x[torch.arange(x.shape[0]), torch.arange(x.shape[0]) * 2 % 6],
    "channel slice": lambda x: x[..., 1:],
    "channel select": lambda x: x[..., 0],
    "channel roll": lambda x: torch.roll(x, 1, -1),
    "channel flip": lambda x: x.flip(-1),
    "channel index": lambda x: x[..., INDEX],
    "channel split": lambda x: x.split(2, -1)[0],
    "merge channels": lambda x: x.flatten(2),
    "patch merging": lambda x: x.reshape(-1, 3, 2, 4, 5).transpose(2, 3).reshape(-1, 3, 4, 10),
    "concatenation": lambda x: torch.cat([x[:, :2], x[:, 3:]], 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, 1),
    "attention": lambda x: (
        torch.softmax(torch.arange(36.0, dtype=torch.float64).reshape(6, 6).sin(), -1) @ x.transpose(1, 2)
    ),
    "max pool": lambda x: nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 2, padding=1),
    "adaptive pool": lambda x: nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 2),
    "padding": lambda x: nn.functional.pad(x, (0, 0, 0, 1, 0, 2)),
}
# and those that a factor passes alone
SCALE = {
    "relu": lambda x: torch.relu(x),
    "negation": lambda x: -x,
    "sum": lambda x: x.sum(1),
    "gate": lambda x: x * torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4, 1).sigmoid(),
    "division": lambda x: x / 3.0,
    "rows of a matrix": lambda x: torch.ones(3, 6, dtype=torch.float64) @ x.transpose(1, 2),
    "columns of a matrix": lambda x: x.transpose(2, 3) @ torch.ones(4, 2, dtype=torch.float64),
    "residual of itself": lambda x: x + x.flip(1),
    "rotary": lambda x: x * COS.double() + torch.cat([-x[..., 2:4], x[..., :2], x[..., 4:]], -1) * SIN.double(),
    "average pool": lambda x: nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2, padding=1),
    **{
        f"{name} of padding": lambda x, pool=pool: pool(nn.functional.pad(x, (0, 0, 0, 1, 2, 0)))
        for name, pool in {
            "mean": lambda x: x.mean(1),
            "largest": lambda x: x.amax((1, 2)),
            "mean of a slice": lambda x: x[:, 1:].mean(1),
            "mean of rolled": lambda x: torch.roll(x, 1, 1).mean(1),
            "sum": lambda x: x.sum(1),
            "adaptive pool": lambda x: nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 2),
            "max pool": lambda x: nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 2, padding=1),
            "average pool": lambda x: nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2, count_include_pad=False),
            "attention": lambda x: (
                torch.softmax(torch.arange(40.0, dtype=torch.float64).reshape(5, 8).sin(), -1) @ x.transpose(1, 2)
            ),
            "sum with unpadded": lambda x: x[:, 2:] + x[:, :6],
        }.items()
    },
}
STOPS = {
    "mean of channels": lambda x: x.mean(-1),
    "mean of all": lambda x: x.mean(),
    "gelu": lambda x: nn.functional.gelu(x),
    "constant": lambda x: x + 1.0,
    "addition": lambda x: x + torch.ones(5, dtype=torch.float64),
    "square": lambda x: x * x,
    "inverse": lambda x: torch.ones(5, dtype=torch.float64) / x,
    "reflection": lambda x: nn.functional.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect"),
    "padding with ones": lambda x: nn.functional.pad(x, (0, 1), value=1.0),
    "layer norm": lambda x: nn.functional.layer_norm(x, (5,)),
    "product over channels": lambda x: x @ torch.ones(5, 2, dtype=torch.float64),
    "computed index of padding": lambda x: nn.functional.pad(x, (0, 0, 0, 0, 0, 1))[:, x[0, :3, 0, 0].argsort()],
    "enlarged padding": lambda x: nn.functional.interpolate(
        nn.functional.pad(x, (0, 0, 0, 1)).permute(0, 3, 1, 2), scale_factor=2.0
    ),
    "padding where masked": lambda x: nn.functional.pad(x, (0, 0, 0, 1)).masked_fill(torch.ones(6, 5, 1).bool(), 1.0),
    "computed channel": lambda x: x[:, 0, 0][torch.arange(x.shape[0]), x[:, 0, 0].argmax(1)],
}


def data() -> Tensor:
    return torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)).double()


def flow_of(function, affine: bool) -> tuple[ChannelFlow, GraphModule, Node]:
    """The flow from a (batch, 6, 4, 5) value, and the node that the model gives."""
    graph_module = capture(Function(lambda x: function(x * 1.0)), [data()]).graph_module
    run_passes(graph_module, [Canonicalize()])  # constants are not folded here: matrices remain matrices
    source = next(n for n in graph_module.graph.nodes if n.target is aten.mul.Tensor)
    flow = ChannelFlow(graph_module, {source: torch.arange(1, 6)}, affine=affine)
    return flow, graph_module, next(n for n in graph_module.graph.nodes if n.op == "output").all_input_nodes[0]


def check(function, *, shifted: bool) -> None:
    """f(x / factor) is f(x) / factor[labels], and with a shift where that passes; elements without a label do not
    change.
    """
    flow, _, last = flow_of(function, affine=shifted)
    labels = flow.labels(last)
    assert labels is not None, "stopped at an operator that commutes"
    before = function(data())
    generator = torch.Generator().manual_seed(1)
    raw = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.arange(6.0).double() if shifted else torch.zeros(6).double()
    factor = torch.ones_like(raw)
    for label in range(1, 6):
        root, sign = flow.ties.find(label)
        assert sign == 1
        factor[label] = raw[root] if root != FIXED else 1.0
    after = function((data() - shift[1:]) / factor[1:])
    assert after.shape == labels.shape and bool((labels != FIXED).any())
    free = labels > 0
    index = labels.clamp(min=0).long()
    torch.testing.assert_close(after[free], ((before - shift[index]) / factor[index])[free])
    assert bool((after[labels == PADDING] == 0).all())


@pytest.mark.parametrize("name", AFFINE)
def test_operators_that_a_factor_and_a_shift_pass(name: str) -> None:
    check(AFFINE[name], shifted=True)


@pytest.mark.parametrize("name", [*SCALE, *AFFINE])
def test_operators_that_a_factor_passes(name: str) -> None:
    check({**SCALE, **AFFINE}[name], shifted=False)


@pytest.mark.parametrize("name", SCALE)
def test_a_shift_stops_where_only_a_factor_passes(name: str) -> None:
    flow, _, last = flow_of(SCALE[name], affine=True)
    assert flow.labels(last) is None and flow.readers


@pytest.mark.parametrize("name", STOPS)
def test_operators_that_stop_both(name: str) -> None:
    for affine in (True, False):
        flow, _, last = flow_of(STOPS[name], affine)
        assert flow.labels(last) is None and flow.readers and flow.readers[0].node.op == "call_function"


def test_rotary_ties_the_two_channels_of_a_pair() -> None:
    flow, _, _ = flow_of(SCALE["rotary"], affine=False)
    roots = [flow.ties.find(label)[0] for label in range(1, 6)]
    assert roots[0] == roots[2] and roots[1] == roots[3] and len(set(roots)) == 3


def test_a_product_ties_queries_to_the_inverse_of_keys() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(8, 4), nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))  # one key head for two query heads
            p = torch.softmax(q @ k.transpose(-1, -2) * 0.7 + torch.ones(6, 6).tril().log(), -1)
            return self.o((p @ v).transpose(1, 2).flatten(2))

    graph_module = canonical(Attention(), torch.randn(2, 6, 8))
    q, k, v, o = (n for n in graph_module.graph.nodes if n.target is aten.linear.default)
    flow = ChannelFlow(graph_module, {q: torch.arange(1, 5), k: torch.arange(5, 7), v: torch.arange(7, 9)})
    keys = [flow.ties.find(label) for label in (5, 6)]
    for label in (1, 2, 3, 4):
        root, sign = flow.ties.find(label)
        assert root == keys[(label - 1) % 2][0] and sign == -keys[(label - 1) % 2][1] and root != FIXED
    (product,) = flow.products
    assert product.shifted and leads_to_softmax(graph_module, product.node)
    (reader,) = [r for r in flow.readers if r.node is o]
    assert reader.columns is not None and reader.columns.tolist() == [7, 8, 7, 8] and reader.shifted
    assert flow.averaged == {7, 8}


def test_a_row_sum_that_is_not_a_softmax_carries_no_shift() -> None:
    flow, _, _ = flow_of(lambda x: torch.ones(6, 6, dtype=torch.float64) @ x.transpose(1, 2), affine=True)
    assert [r.node.target in MATMULS for r in flow.readers] == [True]


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (lambda p: p, True),
        (lambda p: p * 0.5 + torch.ones(3, 6, 6).cumsum(1), True),
        (lambda p: p.reshape(-1, 3, 6, 6), True),
        (lambda p: p.masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9), True),
        (lambda p: p * torch.ones(3, 1, 1).cumsum(0), True),
        (lambda p: p.masked_fill(torch.ones(6, 6).triu(1).bool(), 0.0), False),
        (lambda p: torch.where(p > 0, p, torch.ones(6, 6)), False),
        (lambda p: torch.where(torch.ones(6, 6).tril().bool(), p, torch.full((6, 6), -math.inf)), True),
        (lambda p: p * torch.arange(6.0), False),
        (lambda p: p.transpose(-1, -2), False),
        (lambda p: p.relu(), False),
    ],
)
def test_logits_of_a_softmax(logits, expected: bool) -> None:
    graph_module = canonical(
        Function(lambda x: torch.softmax(logits(x @ x.transpose(-1, -2)), -1)), torch.randn(2, 3, 6, 4)
    )
    product = next(n for n in graph_module.graph.nodes if n.target in MATMULS)
    assert leads_to_softmax(graph_module, product) is expected


def test_logits_that_are_an_output_too() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        p = x @ x.transpose(-1, -2)
        return torch.softmax(p, -1), p

    graph_module = canonical(Function(function), torch.randn(2, 6, 4))
    assert not leads_to_softmax(graph_module, next(n for n in graph_module.graph.nodes if n.target in MATMULS))


def test_softmax_behind() -> None:
    graph_module = canonical(
        Function(lambda x: torch.softmax(x, -1).reshape(-1, 6, 6) @ torch.softmax(x, 1).reshape(-1, 6, 6)),
        torch.randn(2, 2, 6, 6),
    )
    product = next(n for n in graph_module.graph.nodes if n.target in MATMULS)
    assert softmax_behind(product.args[0]) is not None and softmax_behind(product.args[1]) is None


def test_readers_of_branches_are_in_order_and_named() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.norm(x)
            return self.a(h.mean(1)), self.b(nn.functional.pad(h, (0, 0, 0, 1))), h

    graph_module = canonical(Branches(), data().float())
    norm = next(n for n in graph_module.graph.nodes if n.target is aten.layer_norm.default)
    flow = ChannelFlow(graph_module, {norm: torch.arange(1, 6)}, affine=True)
    first, second, output = flow.readers
    assert first.node.target is second.node.target is aten.linear.default and output.node.op == "output"
    assert not first.padded and second.padded and "output of the model" in output.reason
    for reader in (first, second):
        assert reader.columns is not None and reader.columns.tolist() == [1, 2, 3, 4, 5]


def test_sizes_are_no_readers() -> None:
    graph_module = canonical(
        Function(lambda x: torch.relu(nn.functional.layer_norm(x, (5,))).reshape(x.shape[0], x.shape[1] * 4, 5)), data()
    )
    norm = next(n for n in graph_module.graph.nodes if n.target is aten.layer_norm.default)
    flow = ChannelFlow(graph_module, {norm: torch.arange(1, 6)}, affine=True)
    assert [r.node.target for r in flow.readers] == [aten.relu.default]


def test_origin_goes_back_through_layout_only() -> None:
    graph = canonical(Function(lambda x: torch.relu(x).reshape(-1, 5).transpose(0, 1)[1:].unsqueeze(0)), data()).graph
    last = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    assert origin(last).target is aten.relu.default


def test_constant_over() -> None:
    labels = torch.tensor([[1, 2], [PADDING, 2]])
    assert constant_over(labels, [0]).tolist() == [1, 2]  # type: ignore[union-attr]
    assert constant_over(labels, [1]) is None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.sampled_from([1, -1])), max_size=20))
@settings(deadline=None)
def test_ties_give_factors_that_satisfy_every_tie(ties: list[tuple[int, int, int]]) -> None:
    system = Ties()
    for a, b, sign in ties:
        system.tie(a, b, sign)
    log = {root: float(root) for root in range(9)}

    def value(label: int) -> float:
        root, sign = system.find(label)
        return 0.0 if root == FIXED else sign * log[root]

    for a, b, sign in ties:
        assert value(a) == sign * value(b)
