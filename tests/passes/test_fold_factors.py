"""Factors behind a Linear: folded into it, or left alone with a reason."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from helpers import Function, aten, canonical, count, output, sequences
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.errors import PassError
from repquant_fx.passes.base import HISTORY, run_passes
from repquant_fx.passes.fold_factors import FoldFactors
from repquant_fx.passes.identity import NodeProbe

X, W, B, S = sequences(), torch.randn(16, 8), torch.randn(16), torch.rand(16) + 0.5
T = torch.rand(6, 1)


def linear(x: Tensor) -> Tensor:
    return nn.functional.linear(x, W, B)


def shared(x: Tensor) -> Tensor:
    y = linear(x)
    return y + y * S


TAKEN = {
    "number": lambda x: linear(x) * 0.125,
    "on_the_left": lambda x: 3 * linear(x),
    "no_bias": lambda x: x @ W.T * S,
    "one_a_channel": lambda x: linear(x) * S,
    "more_axes": lambda x: S.reshape(1, 1, 16) * linear(x),
    "two": lambda x: linear(x) * S * 0.5,
}
LEFT = {
    "other_reader": (shared, "something else reads"),
    "one_a_token": (lambda x: linear(x) * T, "[6, 1]"),
    "more_axes": (lambda x: linear(x[0]) * S.reshape(1, 1, 16), "[1, 1, 16]"),
    "computed": (lambda x: linear(x) * x.mean(), "is computed"),
    "double": (lambda x: linear(x) * S.double(), "float32"),
}
OTHER = {
    "gate": lambda x: linear(x) * torch.sigmoid(x @ W.T),
    "square": lambda x: linear(x).square() * linear(x),
    "activation": lambda x: (y := linear(x)) * torch.sigmoid(1.702 * y),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_factor_goes_into_the_linear(name: str) -> None:
    graph_module = canonical(Function(TAKEN[name]), X, until=FoldFactors)
    before = output(graph_module, X)
    run_passes(graph_module, [FoldFactors()], NodeProbe([X]))
    torch.testing.assert_close(output(graph_module, X), before)
    assert count(graph_module, aten.linear.default) == 1 and count(graph_module, aten.mul.Tensor) == 0
    assert not FoldFactors()(graph_module).modified


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_go_there_is_left_alone(name: str) -> None:
    function, reason = LEFT[name]
    each = FoldFactors()
    assert not each(canonical(Function(function), X, until=FoldFactors)).modified
    (left,) = each.left_alone
    assert left.operator == "linear" and reason in left.reason


@pytest.mark.parametrize("name", OTHER)
def test_other_products_are_none(name: str) -> None:
    each = FoldFactors()
    assert not each(canonical(Function(OTHER[name]), X, until=FoldFactors)).modified and not each.left_alone


def test_contracts() -> None:
    class Lazy(FoldFactors):
        def run(self, graph_module: torch.fx.GraphModule) -> bool:
            return False

    graph_module = canonical(Function(TAKEN["number"]), X, until=FoldFactors)
    with pytest.raises(PassError, match="multiplies linear by what its weight could hold"):
        run_passes(graph_module, [Lazy()])
    del graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["val"]
    with pytest.raises(PassError, match="no tensor metadata"):
        run_passes(graph_module, [FoldFactors()])


def test_a_compile_runs_it_and_reports() -> None:
    model = Function(lambda x: torch.relu(linear(x) * 0.5) @ W * torch.ones(6, 1))
    result = compile(model, X, Recipe(**PLAIN), example_inputs=[X[:2]])
    (left,) = result.report["left_alone"]
    assert left["by"] == "fold factors" and "[6, 1]" in left["reason"]
    assert "fold factors" in result.graph_module.meta[HISTORY] and count(result.graph_module, aten.mul.Tensor) == 1
