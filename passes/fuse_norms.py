"""Norms that a model writes out become the one operator they are.

RMSNorm is `x * rsqrt(mean(x^2) + eps)`, with a weight on either side; LayerNorm is the RMSNorm of `x - mean(x)`, with a bias.
Only over the last axis, where the channels are.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from repquant_fx.passes.base import aten, copy_meta, is_constant, is_tensor, shape_of

SQUARES = {aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor}


def fuse_norms(graph_module: GraphModule) -> bool:
    """Replace them in place; returns whether there were any."""
    graph, found = graph_module.graph, False
    for node in list(graph.nodes):
        matched = _root_mean_square(node)
        if matched is None:
            continue
        found = True
        x, eps = matched
        norm = _replace(graph, node, aten.rms_norm.default, (x, [shape_of(x)[-1]], None, eps))
        norm = _absorb(graph, norm, aten.mul.Tensor, 2)
        centred = _centred(x)
        if centred is not None:
            args = (centred, norm.args[1], norm.args[2], None, eps)
            norm = _absorb(graph, _replace(graph, norm, aten.layer_norm.default, args), aten.add.Tensor, 3)
    if found:
        graph.eliminate_dead_code()
    return found


def _root_mean_square(node: Node) -> tuple[Node, float] | None:
    """`x` and eps of `x * rsqrt(mean(x^2) + eps)` or `x / sqrt(mean(x^2) + eps)`."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) < 2 or not all(is_tensor(a) for a in node.args):
        return None
    inverse = aten.rsqrt.default if node.target is aten.mul.Tensor else aten.sqrt.default
    orders = [node.args, node.args[::-1]] if node.target is aten.mul.Tensor else [node.args]
    for x, root in orders:
        if not isinstance(x, Node) or not isinstance(root, Node) or root.target is not inverse:
            continue
        total = root.args[0]
        if not isinstance(total, Node) or total.target not in (aten.add.Tensor, aten.add.Scalar) or not isinstance(total.args[1], (int, float)):
            continue
        mean = total.args[0]
        if total.kwargs or not isinstance(mean, Node) or not isinstance(shape_of(x)[-1], int):
            continue
        if (_over_channels(mean) and _square_of(mean.args[0]) is x) or _variance_of(mean, x):
            return x, float(total.args[1])
    return None


def _over_channels(node: Node) -> bool:
    """Whether it is a mean over the last axis that keeps it."""
    if node.target is not aten.mean.dim or len(node.args) < 3 or node.args[2] is not True or node.kwargs:
        return False
    rank = len(shape_of(node))
    return [int(d) % rank for d in node.args[1]] == [rank - 1]  # type: ignore[union-attr,arg-type]


def _square_of(node: Any) -> Node | None:
    if not isinstance(node, Node) or node.target not in SQUARES:
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] != 2:
        return None
    if node.target is aten.mul.Tensor and node.args[0] is not node.args[1]:
        return None
    return node.args[0]  # type: ignore[return-value]


def _variance_of(node: Node, centred: Node) -> bool:
    """Whether it is the (biased) variance of what `centred` takes the mean from."""
    x, rank = _centred(centred), len(shape_of(centred))
    if x is None or node.target is not aten.var.correction or node.args[0] is not x or node.kwargs != {"correction": 0, "keepdim": True}:
        return False
    return [int(d) % rank for d in node.args[1]] == [rank - 1]  # type: ignore[union-attr,arg-type]


def _centred(node: Node) -> Node | None:
    """`x` of `x - mean(x)`."""
    if node.target is not aten.sub.Tensor or node.kwargs:
        return None
    x, mean = node.args
    return x if isinstance(x, Node) and isinstance(mean, Node) and _over_channels(mean) and mean.args[0] is x else None


def _absorb(graph: Graph, norm: Node, operator: object, index: int) -> Node:
    """Make the constant that is all that `operator` adds to the norm its argument `index`."""
    users = list(norm.users)
    if len(users) != 1 or users[0].target is not operator or users[0].kwargs:
        return norm
    others = [a for a in users[0].args if a is not norm]
    if len(others) != 1 or not is_constant(others[0]) or shape_of(others[0]) != [shape_of(norm)[-1]]:  # type: ignore[arg-type]
        return norm
    args = list(norm.args)
    args[index] = others[0]
    merged = _replace(graph, users[0], norm.target, tuple(args))
    graph.erase_node(norm)
    return merged


def _replace(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(node):
        new = copy_meta(node, graph.call_function(target, args), node.meta["val"])
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
