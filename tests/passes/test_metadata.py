"""Metadata after an edit: what depends on it is computed again, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Function, aten, canonical, sequences
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.metadata import refresh_metadata


@pytest.fixture
def graph() -> GraphModule:
    """Two branches of (batch, 6, 8): a narrowed one, and one whose size is the batch's."""
    made = canonical(Function(lambda x: (x[:, :4].exp() + 1, x.reshape(x.shape[0], 48).neg())), sequences(4))
    refresh_metadata(made)
    return made


def only(graph_module: GraphModule, target: Any) -> Node:
    (node,) = graph_module.graph.find_nodes(op="call_function", target=target)
    return node


def test_nothing_changed(graph: GraphModule) -> None:
    before = {node: node.meta["val"] for node in graph.graph.nodes if node.op != "output"}
    refresh_metadata(graph)
    assert len(before) > 5 and all(node.meta["val"] is value for node, value in before.items())


def test_what_depends_on_an_edit(graph: GraphModule) -> None:
    narrowed, exp, other = only(graph, aten.slice.Tensor), only(graph, aten.exp.default), only(graph, aten.neg.default)
    untouched = other.meta["val"]
    narrowed.update_arg(3, 3)
    refresh_metadata(graph)
    assert list(exp.meta["val"].shape[1:]) == [3, 8] and isinstance(exp.meta["val"].shape[0], torch.SymInt)
    assert other.meta["val"] is untouched


def test_another_operator_and_a_new_constant(graph: GraphModule) -> None:
    exp = only(graph, aten.exp.default)
    exp.target = aten.isnan.default
    refresh_metadata(graph)
    assert exp.meta["val"].dtype is torch.bool
    with graph.graph.inserting_before(exp):
        graph.register_buffer("added", torch.zeros(5, 4, 8))
        constant = graph.graph.get_attr("added")
    exp.update_arg(0, constant)
    refresh_metadata(graph)
    assert list(exp.meta["val"].shape) == [5, 4, 8]
    graph.added = torch.zeros(7, 4, 8)
    refresh_metadata(graph)
    assert list(exp.meta["val"].shape) == [7, 4, 8] == list(constant.meta["val"].shape)


def test_padding_keeps_the_batch_free(graph: GraphModule) -> None:
    """torch's own rule for padding a value that was made in this environment gives every size as a number."""
    exp = only(graph, aten.exp.default)
    exp.target, exp.args = aten.pad.default, (exp.args[0], [1, 0, 1, 0], "constant", 0.0)
    refresh_metadata(graph)
    batch, *sizes = exp.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and sizes == [5, 9]


@pytest.mark.parametrize("operator", [aten.addcmul.default, aten.addcdiv.default])
def test_a_product_is_added_to_constants(operator: Any) -> None:
    made = canonical(Function(lambda x: x.exp() + 1), sequences(4))
    exp = only(made, aten.exp.default)
    made.register_buffer("added", torch.zeros(1, 1, 8))
    with made.graph.inserting_before(exp):
        constant = made.graph.get_attr("added")
    exp.target, exp.args = operator, (constant, constant, exp.args[0])
    refresh_metadata(made)
    batch, *sizes = exp.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and sizes == [6, 8]


def test_a_value_that_somebody_set(graph: GraphModule) -> None:
    exp = only(graph, aten.exp.default)
    right, exp.meta["val"] = exp.meta["val"], exp.meta["val"].new_zeros(1)
    refresh_metadata(graph)
    assert exp.meta["val"].shape == right.shape


def test_a_graph_that_was_not_captured() -> None:
    with pytest.raises(PassError, match="no fake tensors"):
        refresh_metadata(torch.fx.symbolic_trace(torch.nn.ReLU()))
