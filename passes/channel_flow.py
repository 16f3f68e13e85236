"""Which operators carry a per-channel affine through unchanged, and where the channel axis goes.

A per-channel affine `x -> (x + shift) / ratio` commutes with everything that only moves, selects or averages along other axes.
It does not commute with zero padding (the zeros would have to be shifted too).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from repquant_fx.passes.base import aten, is_tensor, module_path, shape_of


@dataclass
class Reader:
    """A node that reads a channel-carrying value: its operand index, the value it reads and the value's channel axis."""

    node: Node
    value: Node
    axis: int


@dataclass
class Flow:
    """Everything reached from a value through transparent operators."""

    readers: list[Reader] = field(default_factory=list)
    obstacles: dict[Node, str] = field(default_factory=dict)


def follow(value: Node, axis: int) -> Flow:
    """Follow `value`, whose channels lie on `axis`, to the first operators that are not transparent."""
    flow = Flow()
    pending, seen = [(value, axis)], set()
    while pending:
        current, where = pending.pop()
        for user in current.users:
            if user.op == "output":
                flow.obstacles[user] = "it is an output of the model"
                flow.readers.append(Reader(user, current, where))
                continue
            if user.target is aten.sym_size.int:
                continue
            after = carry(user, current, where)
            if isinstance(after, int):
                if (user, after) not in seen:
                    seen.add((user, after))
                    pending.append((user, after))
            else:
                if after:
                    flow.obstacles[user] = after
                flow.readers.append(Reader(user, current, where))
    order = {node: index for index, node in enumerate(value.graph.nodes)}
    flow.readers.sort(key=lambda r: order[r.node])
    return flow


def carry(node: Node, value: Node, axis: int) -> int | str:
    """Channel axis of `node`'s result, or '' when `node` is simply another reader, or why the affine stops here."""
    if node.op != "call_function" or not node.args or node.args[0] is not value:
        return ""
    target = node.target
    if target is operator.getitem:
        return axis if not isinstance(value.meta.get("val"), torch.Tensor) else ""
    rank = len(shape_of(value)) if is_tensor(value) else None
    if target in (aten.pad.default, aten.constant_pad_nd.default):
        return f"zero padding at {module_path(node) or node.name} does not commute with a shift"
    if rank is None:
        return ""

    args: tuple[Any, ...] = node.args  # read by position, as the operators' schemas say

    def at(dim: Any) -> int:
        return int(dim) % rank

    if target is aten.reshape.default:
        return _through_reshape(value, node, axis)
    if target is aten.permute.default:
        return [at(d) for d in args[1]].index(axis)  # type: ignore[union-attr]
    if target is aten.transpose.int:
        a, b = at(args[1]), at(args[2])
        return {a: b, b: a}.get(axis, axis)
    if target is aten.roll.default:
        dims = args[2] if len(args) > 2 else []
        return axis if dims and axis not in [at(d) for d in dims] else ""  # type: ignore[union-attr]
    if target in (aten.slice.Tensor, aten.index_select.default, aten.flip.default):
        dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1] if len(args) > 1 else 0]
        return axis if axis not in [at(d) for d in dims] else ""
    if target is aten.select.int:
        dim = at(args[1])
        return "" if dim == axis else axis - (dim < axis)
    if target in (aten.mean.dim,):
        dims = [at(d) for d in args[1]] if args[1] else list(range(rank))  # type: ignore[union-attr]
        keep = bool(args[2]) if len(args) > 2 else False
        return "" if axis in dims else axis - (0 if keep else sum(d < axis for d in dims))
    if target is aten.unsqueeze.default:
        dim = int(args[1]) % (rank + 1)  # type: ignore[call-overload]
        return axis + (dim <= axis)
    if target in (aten.squeeze.dim, aten.squeeze.dims):
        dims = [at(d) for d in (args[1] if isinstance(args[1], (list, tuple)) else [args[1]])]
        return "" if axis in dims else axis - sum(d < axis for d in dims)
    if target is aten.expand.default:
        return axis + len(args[1]) - rank  # type: ignore[arg-type]
    if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        dim = at(args[2]) if len(args) > 2 else 0
        return axis if dim != axis else ""
    if target is aten.unbind.int:
        dim = at(args[1]) if len(args) > 1 else 0
        return "" if dim == axis else axis - (dim < axis)
    if target is aten.index.Tensor:
        indices = args[1]
        used = [i for i, index in enumerate(indices) if index is not None]  # type: ignore[union-attr,arg-type]
        if used and max(used) < axis and is_tensor(node):
            return len(shape_of(node)) - (rank - axis)
    return ""


def _through_reshape(value: Node, node: Node, axis: int) -> int | str:
    before, after = shape_of(value), shape_of(node)
    channels, trailing = before[axis], before[axis + 1:]
    if not isinstance(channels, int) or not all(isinstance(t, int) for t in trailing):
        return ""
    size, tail = math.prod(trailing), 1  # type: ignore[arg-type]
    for position in range(len(after) - 1, -1, -1):
        extent = after[position]
        if tail == size and extent == channels and isinstance(extent, int):
            return position
        if not isinstance(extent, int):
            break
        tail *= extent
        if tail > size * channels:
            break
    return ""


LAYOUT = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints, aten.unflatten.int,
}


def origin(value: Node) -> Node:
    """Go back through operators that only change the layout of their one tensor input."""
    while value.op == "call_function" and value.target in LAYOUT and isinstance(value.args[0], Node):
        value = value.args[0]
    return value
