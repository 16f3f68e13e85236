"""Fold layer scale: a factor for each channel behind a Linear becomes part of its weight and bias.

`gamma * (x W^T + b)` is `x (gamma W)^T + gamma b`: an operator less, and the Linear writes straight into what its
output is added to.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, aten, attribute, drop_constant, is_constant, is_tensor, shape_of
from repquant_fx.passes.parameters import set_parameters, weight_and_bias
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.quantizers.affine import scale_output


class FoldLayerScale(Pass):
    name = "fold layer scale"
    needs = "a canonical graph with tensor metadata"
    guarantees = (
        "no Linear's output is multiplied by a constant of its channels and read by nothing else; the outputs are "
        "unchanged"
    )
    takes = gives = CANONICAL
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is aten.mul.Tensor:
                modified |= _fold(graph_module, node)
        return modified


def _fold(graph_module: GraphModule, product: Node) -> bool:
    for linear, factor in (product.args[:2], product.args[1::-1]):
        if isinstance(linear, Node) and isinstance(factor, Node) and _folds(linear, factor):
            break
    else:
        return False
    gamma = attribute(graph_module, factor).double().reshape(-1)
    set_parameters(graph_module, linear, *scale_output(*weight_and_bias(graph_module, linear), gamma))
    product.replace_all_uses_with(linear)
    graph_module.graph.erase_node(product)
    drop_constant(graph_module, factor)
    return True


def _folds(linear: Node, factor: Node) -> bool:
    """Whether `factor` holds a number for each output channel of `linear`, which nothing else reads."""
    if (
        linear.target is not aten.linear.default
        or len(linear.users) != 1
        or not is_constant(factor)
        or not is_tensor(factor)
    ):
        return False
    if not is_constant(linear.args[1]) or not all(a is None or is_constant(a) for a in linear.args[2:]):
        return False
    sizes = shape_of(factor)
    return (
        all(size == 1 for size in sizes[:-1])
        and sizes[-1:] == shape_of(linear)[-1:]
        and factor.meta["val"].is_floating_point()
    )
