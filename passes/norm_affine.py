"""Whether the gain and bias of a norm can move into what reads it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import aten, is_constant, shape_of
from repquant_fx.passes.channel_flow import ChannelFlow, Reader


def folds(graph_module: GraphModule, norm: Node) -> bool:
    """Whether the gain and bias of a norm can move into what reads it: into Linears alone."""
    affine = norm.args[2:4] if norm.target is aten.layer_norm.default else norm.args[2:3]
    affine = tuple(argument for argument in affine if argument is not None)
    return not affine or (all(is_constant(a) for a in affine) and affine_readers(graph_module, norm) is not None)


def affine_readers(graph_module: GraphModule, norm: Node) -> list[Reader] | None:
    """The Linears that read a norm, where nothing else does and each reads its channels in order; else None."""
    size = shape_of(norm)[-1]
    if not isinstance(size, int):
        return None
    channels = torch.arange(1, size + 1, dtype=torch.int32)
    readers = ChannelFlow(graph_module, {norm: channels}, affine=True).readers
    right = all(r.node.target is aten.linear.default and r.node.args[0] is r.value and is_constant(r.node.args[1])
                and r.columns is not None and torch.equal(r.columns, channels) for r in readers)
    return readers if right else None
