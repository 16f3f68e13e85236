"""A constant that the output of a Linear is multiplied by goes into its weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, attribute, drop_constant, is_constant, is_tensor, shape_of
from repquant_fx.passes.parameters import set_parameters, weight_and_bias
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.quantizers.affine import scale_output

aten = torch.ops.aten


class FoldFactors(Pass):
    """`linear(x, W, b) * s` becomes `linear(x, W * s[:, None], b * s)`, for a number s or one per output channel."""

    name = "fold factors"
    needs = "the normal form, with a shape at every Linear"
    guarantees = "the same outputs; a constant factor of the output channels of a Linear is in its weight and bias"
    takes = gives = CANONICAL
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for product, linear, factor in _matches(graph_module):
            if reason := _obstacle(product, linear, factor):
                self.leave(linear, reason)
            else:
                _fold(graph_module, product, linear, factor)
                modified = True
        return modified

    def requires(self, graph_module: GraphModule) -> None:
        super().requires(graph_module)
        for linear in graph_module.graph.find_nodes(op="call_function", target=aten.linear.default):
            shape_of(linear)  # raises

    def ensures(self, graph_module: GraphModule) -> None:
        super().ensures(graph_module)
        for product, linear, factor in _matches(graph_module):
            if not _obstacle(product, linear, factor):
                raise PassError(f"{product.name} multiplies {linear.name} by what its weight could hold")


def _matches(graph_module: GraphModule) -> Iterator[tuple[Node, Node, Any]]:
    """Products with a Linear and its factor: any constant, or what is computed in the shape of a foldable one."""
    for product in graph_module.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        for linear, factor in (product.args[:2], product.args[1::-1]):
            if isinstance(linear, Node) and linear.target is aten.linear.default:
                if is_constant(factor) or _per_channel(product, linear, factor):
                    yield product, linear, factor


def _per_channel(product: Node, linear: Node, factor: Any) -> bool:
    """Whether a factor is one number, or one per output channel.

    A number beside another reader is part of an activation that is written out: `0.5 * y * (1 + tanh(y))`.
    """
    if not is_tensor(factor):
        return isinstance(factor, (int, float)) and len(linear.users) == 1
    *others, last = shape_of(factor) or [1]
    channels = all(size == 1 for size in others) and last in (1, shape_of(linear)[-1])
    return channels and shape_of(product) == shape_of(linear)


def _obstacle(product: Node, linear: Node, factor: Any) -> str:
    """Why a factor cannot go into the Linear; '' where it can."""
    if len(linear.users) > 1:
        return "its output is multiplied by a factor, and something else reads it as well"
    if not _per_channel(product, linear, factor):
        return f"a factor of shape {shape_of(factor)} multiplies it, which is not one value per output channel"
    if not all(is_constant(each) for each in (factor, *linear.args[1:]) if isinstance(each, Node)):
        return "a factor per output channel multiplies it, but the factor, its weight or its bias is computed"
    if any(node.meta["val"].dtype != torch.float32 for node in (product, linear)):
        return "a factor multiplies it, but not in float32"
    return ""


def _fold(graph_module: GraphModule, product: Node, linear: Node, factor: Any) -> None:
    scale = attribute(graph_module, factor) if isinstance(factor, Node) else torch.tensor(factor)
    weight, bias = weight_and_bias(graph_module, linear)
    set_parameters(graph_module, linear, *scale_output(weight, bias, scale.double().reshape(-1).expand(len(weight))))
    product.replace_all_uses_with(linear)
    graph_module.graph.erase_node(product)
    if isinstance(factor, Node):
        drop_constant(graph_module, factor)
