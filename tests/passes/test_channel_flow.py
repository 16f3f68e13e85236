"""Where a per-channel affine goes: what `carry` claims is checked by computing both sides."""

from __future__ import annotations

import pytest
import torch
from helpers import Function, aten, canonical
from torch import Tensor, nn
from torch.fx import Node

from repquant_fx.passes.channel_flow import carry, follow, origin

INDEX = torch.tensor([2, 0, 1])

COMMUTES = {
    "reshape tokens": lambda x: x.reshape(-1, 6, 4, 5),
    "flatten tokens": lambda x: x.flatten(1, 2),
    "unflatten tokens": lambda x: x.unflatten(1, (2, 3)),
    "merge batch": lambda x: x.reshape(-1, 5),
    "windows": lambda x: x.reshape(-1, 2, 3, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 5),
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "split heads after channels first": lambda x: x.permute(0, 3, 1, 2).reshape(-1, 5, 24),
    "transpose": lambda x: x.transpose(1, 3),
    "transpose others": lambda x: x.transpose(1, 2),
    "roll": lambda x: torch.roll(x, (1, -2), (1, 2)),
    "slice": lambda x: x[:, 1:4],
    "select": lambda x: x[:, 0],
    "select twice": lambda x: x[:, 0, -1],
    "mean": lambda x: x.mean(1),
    "mean of both": lambda x: x.mean((1, 2)),
    "mean kept": lambda x: x.mean((1, 2), keepdim=True),
    "unsqueeze before": lambda x: x.unsqueeze(1),
    "unsqueeze after": lambda x: x.unsqueeze(-1),
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
}

STOPS = {
    "mean of channels": lambda x: x.mean(-1),
    "mean of all": lambda x: x.mean(),
    "channel slice": lambda x: x[..., 1:],
    "channel select": lambda x: x[..., 0],
    "channel roll": lambda x: torch.roll(x, 1, -1),
    "flat roll": lambda x: torch.roll(x, 1),
    "channel flip": lambda x: x.flip(-1),
    "channel index": lambda x: x[..., INDEX],
    "channel split": lambda x: x.split(2, -1)[0],
    "channel unbind": lambda x: x.unbind(-1)[0],
    "merge channels": lambda x: x.flatten(2),
    "patch merging": lambda x: x.reshape(-1, 3, 2, 4, 5).transpose(2, 3).reshape(-1, 3, 4, 10),
    "nonlinear": lambda x: torch.relu(x),
    "sum": lambda x: x.sum(1),
    "concatenation": lambda x: torch.cat([x, x.relu()], 1),
    "addition": lambda x: x + x.flip(1),
}


def data() -> Tensor:
    return torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)).double()


def carried(function) -> int | str:
    """Follow the channels of a (batch, 6, 4, 5) input through `function` as far as they go."""
    graph = canonical(Function(function), data()).graph
    node: Node = next(n for n in graph.nodes if n.op == "placeholder")
    axis: int | str = 3
    while True:
        users = [u for u in node.users if u.target is not aten.sym_size.int]
        if len(users) != 1 or users[0].op == "output":
            return axis if len(users) == 1 else ""
        axis = carry(users[0], node, axis)  # type: ignore[arg-type]
        if isinstance(axis, str):
            return axis
        node = users[0]


@pytest.mark.parametrize("name", COMMUTES)
def test_transparent_operators(name: str) -> None:
    function, x = COMMUTES[name], data()
    axis = carried(function)
    assert isinstance(axis, int), "stopped at a transparent operator"
    ratio, shift = torch.rand(5, generator=torch.Generator().manual_seed(1)).double() + 0.5, torch.arange(5.0).double()
    after = function(x)
    shape = [1] * after.ndim
    shape[axis] = 5
    assert after.shape[axis] == 5
    torch.testing.assert_close(function((x + shift) / ratio), (after + shift.reshape(shape)) / ratio.reshape(shape))


@pytest.mark.parametrize("name", STOPS)
def test_operators_that_mix_or_select_channels(name: str) -> None:
    assert carried(STOPS[name]) == ""


def test_padding_stops_with_a_reason() -> None:
    assert "zero padding" in str(carried(lambda x: nn.functional.pad(x, (0, 0, 0, 1))))


def test_a_norm_through_branches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.norm(x)
            return self.a(h.mean(1)), self.b(h[:, 0]), h, nn.functional.pad(h, (0, 0, 0, 1))

    graph = canonical(Branches(), data().float()).graph
    norm = next(n for n in graph.nodes if n.target is aten.layer_norm.default)
    flow = follow(norm, 3)
    assert [r.node.target for r in flow.readers if r.node.op != "output"].count(aten.linear.default) == 2
    assert all(r.axis == 2 for r in flow.readers if r.node.target is aten.linear.default)
    reasons = " ".join(flow.obstacles.values())
    assert "output of the model" in reasons and "zero padding" in reasons
    order = {n: i for i, n in enumerate(graph.nodes)}
    positions = [order[r.node] for r in flow.readers]
    assert positions == sorted(positions)


def test_sizes_are_no_readers() -> None:
    graph = canonical(Function(lambda x: torch.relu(nn.functional.layer_norm(x, (5,))).reshape(x.shape[0], x.shape[1] * 4, 5)), data()).graph
    norm = next(n for n in graph.nodes if n.target is aten.layer_norm.default)
    assert [r.node.target for r in follow(norm, 3).readers] == [aten.relu.default]


def test_origin_goes_back_through_layout_only() -> None:
    graph = canonical(Function(lambda x: torch.relu(x).reshape(-1, 5).transpose(0, 1)[1:].unsqueeze(0)), data()).graph
    last = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    assert origin(last).target is aten.relu.default
