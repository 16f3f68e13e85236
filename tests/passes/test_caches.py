"""Caches are told by dataflow, and what their Concats append is all that analyses see of them."""

from __future__ import annotations

import torch
from helpers import canonical
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.passes.base import aten
from repquant_fx.passes.caches import append_of, appended, axis_of, caches
from repquant_fx.passes.channel_flow import ChannelFlow
from repquant_fx.passes.vector_flow import VectorFlow


class Attention(nn.Module):
    """Two heads of 4 channels with a cache of keys and values; one more input is joined, and is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, other: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        scores = torch.softmax(q @ k.transpose(2, 3), -1)
        return self.out((scores @ v).transpose(1, 2).flatten(2)) + torch.cat([other, x], 1).sum() + other.sum()


def attention() -> GraphModule:
    caches = (torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4))
    return canonical(Attention(), torch.randn(2, 5, 8), *caches, torch.randn(2, 3, 8))


def test_caches_are_inputs_that_are_appended_to() -> None:
    graph_module = attention()
    found = caches(graph_module)
    assert [str(node.target) for node in found] == ["keys", "values"] and {axis_of(c) for c in found.values()} == {2}
    inputs = {str(node.target): node for node in graph_module.graph.find_nodes(op="placeholder")}
    assert append_of(inputs["other"]) is None  # read otherwise as well
    concats = graph_module.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [appended(node) is not None for node in concats] == [True, True, False]


def test_factors_and_rotations_pass_what_is_appended() -> None:
    graph_module = attention()
    linears = graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    value = next(node for node in linears if "v" in str(node.args[1].target).split("."))
    flow = ChannelFlow(graph_module, {value: torch.arange(1, 9, dtype=torch.int32)})
    assert [reader.node for reader in flow.readers] == [linears[-1]]  # the output projection alone
    heads = [space for space in VectorFlow(graph_module, 4).spaces if not space.reason and space.readers]
    assert any(value in [writer for writer, _ in space.writers] for space in heads)
