"""Fold: what is computed from parameters and buffers alone becomes a constant, so that matchers see constants.

A bias put together from parts (BEiT's q and v biases around zeros), `1 + weight` of an RMS norm, a relative position
bias looked up in its table: each is one tensor afterwards, under the name of what it came from where that is one
tensor.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from repquant_fx.passes.base import Pass, add_tensor, attribute, copy_meta, drop_constant, module_path
from repquant_fx.passes.spec import CAPTURED
from repquant_fx.torch_private import OpOverload, schema

GROWTH = 4  # a folded tensor may be this many times larger than all it came from...
SMALL = 1 << 16  # ...or this many elements


class FoldConstants(Pass):
    """An operator on constants alone becomes a constant of the shape and dtype of its result."""

    name = "fold constants"
    needs = "an ATen graph whose constants nothing writes into"
    guarantees = (
        "no operator reads constants alone, but for some that would make much larger ones; the outputs are unchanged"
    )
    takes = gives = CAPTURED
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        constant = {n for n in graph_module.graph.nodes if n.op == "get_attr" and _is_tensor_at(graph_module, n)}
        for node in graph_module.graph.nodes:
            if (
                _pure(node)
                and all(p in constant for p in node.all_input_nodes)
                and not any(_writes(u) for u in node.users)
            ):
                constant.add(node)
        frontier = [n for n in constant if n.op != "get_attr" and any(u not in constant for u in n.users)]
        order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        folded = [self._fold(graph_module, n) for n in sorted(frontier, key=order.__getitem__)]
        return any(folded)

    def _fold(self, graph_module: GraphModule, node: Node) -> bool:
        expected = node.meta.get("val")  # nothing is computed that would not be kept
        most = max(SMALL, GROWTH * sum(attribute(graph_module, n).numel() for n in _sources(node)))
        size = expected.numel() if isinstance(expected, Tensor) else None
        if isinstance(size, int) and size > most:
            self.leave(node, f"it is computed from constants alone, but {size} elements would be too many to store")
            return False
        values: dict[Node, Any] = {}
        with torch.no_grad():
            value = _evaluate(graph_module, node, values)
        sources = [n for n in values if n.op == "get_attr"]
        if not isinstance(value, Tensor) or value.numel() > most:
            return False
        graph = graph_module.graph
        path = str(sources[0].target) if len(sources) == 1 else ".".join(filter(None, (module_path(node), node.name)))
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", "")
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        pending = [node]
        while pending:  # what only this read goes, so that its name is free
            last = pending.pop()
            if last.users:
                continue
            parents = list(last.all_input_nodes)
            if last.op == "get_attr":
                drop_constant(graph_module, last)
            else:
                graph.erase_node(last)
            pending.extend(p for p in parents if not p.users and p not in pending)
        new.target = add_tensor(graph_module, path, value.contiguous())
        copy_meta(node, new, value)
        new.meta["val"] = node.meta.get("val", value)
        return True


def _sources(node: Node) -> set[Node]:
    """The constants that a node is computed from."""
    ancestors, pending = {node}, [node]
    while pending:
        fresh = [parent for parent in pending.pop().all_input_nodes if parent not in ancestors]
        ancestors.update(fresh)
        pending.extend(fresh)
    return {n for n in ancestors if n.op == "get_attr"}


def _evaluate(graph_module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [p for p in current.all_input_nodes if p not in values]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if current in values:
            continue
        if current.op == "get_attr":
            values[current] = attribute(graph_module, current).detach()
        else:
            args, kwargs = map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = cast(Any, current.target)(*args, **kwargs)
    return values[node]


def _pure(node: Node) -> bool:
    """Whether a node's result follows from its arguments: no draw of random numbers, nothing written."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if not isinstance(node.target, OpOverload) or not all(isinstance(t, Tensor) for t in tensors):
        return False
    return not _writes(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and schema(node.target).is_mutable


def _is_tensor_at(graph_module: GraphModule, node: Node) -> bool:
    owner: object = graph_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return isinstance(owner, Tensor)
