"""Key/value caches in a graph: inputs that hold what earlier tokens gave, and the Concats that append what new ones
give.

They are told by dataflow alone: a cache is an input of floating point whose values one Concat reads, first of two.
What comes later reads old and new tokens alike, so a factor or a rotation that the new ones carry is in the old ones,
too: they were computed by the same graph.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import aten, is_tensor, shape_of
from repquant_fx.passes.operators import SIZED


def append_of(cache: Node) -> Node | None:
    """The Concat that appends to a graph's input; None where the input is no cache."""
    if cache.op != "placeholder" or not is_tensor(cache) or len(shape_of(cache)) < 3:
        return None
    readers = [user for user in cache.users if user.target not in SIZED]
    if len(readers) != 1 or readers[0].target is not aten.cat.default:
        return None
    parts = cast("list[Node]", readers[0].args[0])
    return readers[0] if len(parts) == 2 and parts[0] is cache and is_tensor(parts[1]) else None


def appended(node: Node) -> Node | None:
    """What a node appends to a cache; None where it appends to none."""
    if node.target is not aten.cat.default:
        return None
    first, *rest = cast("list[Node]", node.args[0])
    return rest[0] if append_of(first) is node else None


def caches(graph_module: GraphModule) -> dict[Node, Node]:
    """The Concat of each cache, in the order of the inputs."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    return {node: append for node in inputs if (append := append_of(node)) is not None}


def axis_of(append: Node) -> int:
    """Along which axis a Concat appends, from 0."""
    given = append.args[1] if len(append.args) > 1 else append.kwargs.get("dim", 0)
    return int(cast(int, given)) % len(shape_of(append))


def constant_along(labels: Tensor, axis: int) -> bool:
    """Whether labels are the same all along an axis, such as for each token."""
    return torch.equal(labels.narrow(axis, 0, 1).expand(labels.shape), labels)


def lengthened(labels: Tensor, axis: int, size: int) -> Tensor:
    """What the first of some new tokens has, for `size` old and new ones."""
    return labels.narrow(axis, 0, 1).expand([size if place == axis else n for place, n in enumerate(labels.shape)])
