"""Fold what is computed from parameters alone: the norm weight `1 + w`, a bias made of parts, a small network over coordinates.

What would grow is left to be computed (a table gathered into a large bias stays a table), so that files stay small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from repquant_fx.passes.base import attribute, constant_node, copy_meta, is_tensor, module_path
from repquant_fx.passes.channel_flow import SOFTMAX

SMALL = 4096  # elements that a result may always have


def fold_constants(graph_module: GraphModule) -> bool:
    """Replace such values by constants; returns whether there were any."""
    leaves = _constant_leaves(graph_module)
    folded = {node for node, read in leaves.items() if node.op == "call_function" and is_tensor(node)
              and node.meta["val"].numel() <= max(SMALL, sum(leaf.meta["val"].numel() for leaf in read))}
    values: dict[Node, Any] = {}
    wanted = [node for node in folded if any(user not in folded for user in node.users)]
    for node in wanted:
        value = _evaluate(graph_module, node, values)
        new = constant_node(graph_module, _name(node, leaves[node]), value, node)
        copy_meta(node, new)
        node.replace_all_uses_with(new)
    if wanted:
        graph_module.graph.eliminate_dead_code()
    return bool(wanted)


def drop_unread(graph_module: GraphModule) -> None:
    """Delete parameters and buffers that no node reads."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    named = [*graph_module.named_parameters(remove_duplicate=False), *graph_module.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in named if name not in read]:
        owner, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), leaf)


def _constant_leaves(graph_module: GraphModule) -> dict[Node, dict[Node, None]]:
    """The parameters that each constant node is computed from, in the order they are read."""
    leaves: dict[Node, dict[Node, None]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            leaves[node] = {node: None}
        elif node.op == "call_function" and all(p in leaves for p in node.all_input_nodes) and _foldable(node):
            leaves[node] = {leaf: None for p in node.all_input_nodes for leaf in leaves[p]}
    return leaves


def _foldable(node: Node) -> bool:
    """Whether it gives tensors, the same each time; a Softmax stays in sight, for it tells that its rows sum to 1."""
    return (isinstance(node.meta.get("val"), (Tensor, list, tuple)) and node.target not in SOFTMAX
            and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()))


@torch.no_grad()
def _evaluate(graph_module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node not in values:
        if node.op == "get_attr":
            return attribute(graph_module, node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda parent: _evaluate(graph_module, parent, values))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _name(node: Node, leaves: dict[Node, None]) -> str:
    """`attn.q_bias_cat` for the concatenation of `attn.q_bias` with others."""
    operator = str(node.target).split(".")[1] if "." in str(node.target) else node.name
    path = module_path(node)
    stem = str(max(leaves, key=lambda leaf: leaf.meta["val"].numel()).target) if leaves else f"{path}.constant" if path else "constant"
    return f"{stem}_{operator}"
