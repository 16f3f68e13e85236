"""The weight and bias of layers and norms: read in float64, replaced in float32 without touching any other reader."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.naming import WEIGHT, beside
from repquant_fx.passes.base import attribute, replace_constant
from repquant_fx.passes.operators import PARAMETERS


def parameters(graph_module: GraphModule, node: Node) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, float64; None for what there is not."""
    weight, bias = (*(_constant(graph_module, node, index) for index in PARAMETERS[node.target]), None)[:2]
    return weight, bias


def weight_of(graph_module: GraphModule, node: Node) -> Tensor:
    """The weight of what has one, float64."""
    weight = _constant(graph_module, node, PARAMETERS[node.target][0])
    assert weight is not None
    return weight


def weight_and_bias(graph_module: GraphModule, node: Node) -> tuple[Tensor, Tensor | None]:
    """Both, of what has a weight."""
    return weight_of(graph_module, node), parameters(graph_module, node)[1]


def set_parameters(graph_module: GraphModule, node: Node, weight: Tensor | None, bias: Tensor | None) -> None:
    """Replace both; None leaves what is there. Names are kept, and a new bias is named beside the weight."""
    places = PARAMETERS[node.target]
    old = _argument(node, places[0])
    name = str(old.target) if old is not None else WEIGHT.of(node.name)
    if weight is not None:
        replace_constant(graph_module, node, places[0], weight.float(), name)
    if bias is not None:
        replace_constant(graph_module, node, places[1], bias.float(), beside(name, "bias"))


def _constant(graph_module: GraphModule, node: Node, index: int) -> Tensor | None:
    argument = _argument(node, index)
    return None if argument is None else attribute(graph_module, argument).double()


def _argument(node: Node, index: int) -> Node | None:
    argument = node.args[index] if index < len(node.args) else None
    return argument if isinstance(argument, Node) else None
