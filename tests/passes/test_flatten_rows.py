"""Flat token matrices: the same values, and reshapes only where an operator needs the axes."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Encoder,
    Function,
    PostNorm,
    aten,
    canonical,
    count,
    images,
    output,
    quantized,
    redraw,
    sequences,
    values_at,
)
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import run_pass, run_passes
from repquant_fx.passes.flatten_rows import FlattenRows
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.recipe import Recipe


def flattened(graph_module: GraphModule, x: Tensor, **changes: object) -> tuple[GraphModule, int, int]:
    """The graph after the pass, and how many reshapes it had and has. Every value is compared, up to its leading axes.
    """
    run = quantized(graph_module, Recipe(**changes), [x])  # type: ignore[arg-type]
    graph_module = run.graph_module
    quantizers = list(run_pass(graph_module, LowerToQDQ(run.plan, run.weights)).quantizers.values())
    codes, expected = values_at(graph_module, quantizers, x), output(graph_module, x)
    before = count(graph_module, aten.reshape.default)
    result = run_passes(graph_module, [FlattenRows()])
    assert torch.equal(output(result, x), expected)
    assert torch.equal(output(result, x[:3]), expected[:3])
    for old, new in zip(codes, values_at(result, quantizers, x)):
        assert torch.equal(old, new)
    for node in result.graph.nodes:
        assert node.op == "output" or "val" in node.meta
    return result, before, count(result, aten.reshape.default)


def rank(graph_module: GraphModule, target: object) -> list[int]:
    return [n.meta["val"].ndim for n in graph_module.graph.nodes if n.target is target]


def test_vit(vit_graph) -> None:
    result, before, after = flattened(vit_graph(), images(16))
    # 4 around patches, 2 per block around attention, 2 where the stream of tokens becomes flat, 1 before the head takes
    # one token
    assert (before, after) == (20, 11)
    assert set(rank(result, aten.gelu.default)) == {2}
    assert rank(result, aten.layer_norm.default).count(2) >= 4


def test_swin(swin_graph) -> None:
    _, before, after = flattened(swin_graph(), images(16))
    assert after < before


@pytest.mark.parametrize(
    "make", [lambda: Encoder(norm="rms", bias=False), lambda: Encoder(depth=2, causal=True), PostNorm]
)
def test_sequences(make) -> None:
    result, before, after = flattened(canonical(redraw(make()), sequences()), sequences())
    assert after < before
    assert set(rank(result, aten.linear.default)) == {2}


def test_broadcast_over_tokens_keeps_its_axes() -> None:
    """An addend with one row for each position is not row-wise."""
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(1, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) + self.table))

    result, before, after = flattened(canonical(redraw(Positions()), sequences()), sequences())
    (added,) = [n for n in result.graph.nodes if n.target is aten.add.Tensor]
    assert added.meta["val"].ndim == 3 and before == after


def test_both_residuals_flat() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.nn.functional.silu(self.a(x)) * self.b(x) + x)

    result, _, after = flattened(canonical(redraw(Two()), sequences()), sequences())
    assert after == 3  # x to the Linears, x to the addition, the result
    assert rank(result, aten.mul.Tensor) == [2]


def test_nothing_to_do() -> None:
    graph_module = canonical(Function(lambda x: torch.relu(x).sum(-1)), sequences())
    assert not FlattenRows().run(graph_module)


def test_sizes_are_read_from_inputs() -> None:
    """No value between is kept alive for its shape alone."""
    result, _, _ = flattened(canonical(redraw(Encoder(depth=2)), sequences()), sequences())

    def source(node: Node) -> str:
        return node.args[0].op  # type: ignore[union-attr]

    assert {source(n) for n in result.graph.nodes if n.target is aten.sym_size.int} <= {"placeholder"}
