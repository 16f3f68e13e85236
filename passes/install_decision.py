"""Install a decision: quantizers in place of a group's observers, integer codes in place of its weights."""

from __future__ import annotations

from typing import cast

from torch.fx import GraphModule, Node

from repquant_fx.decision import Decision
from repquant_fx.errors import PassError
from repquant_fx.naming import QUANTIZED, SCALE, ZERO_POINT, beside
from repquant_fx.passes.base import (
    Pass,
    attribute,
    constant_node,
    copy_meta,
    drop_constant,
    free_stem,
    replace_constant,
)
from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.passes.slots import install
from repquant_fx.passes.spec import OBSERVED
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.weight import ChosenWeight


class InstallDecision(Pass):
    """Installs what the decision speaks of.

    A weight of shape (out, in, ...) becomes int8 codes of the same shape and float32 scales of shape (out,), or
    (out, groups), read through `dequantize`; its bias float32 of shape (out,).
    """

    name = "install decision"
    needs = "a slot at each site, and a float weight at each consumer, that the decision speaks of"
    guarantees = (
        "these sites hold quantizers; these consumers read the dequantized value of integer codes, and their float "
        "weights are gone"
    )
    takes = gives = OBSERVED

    def __init__(self, group: Group, decision: Decision) -> None:
        super().__init__()
        self.group, self.decision = group, decision

    def run(self, graph_module: GraphModule) -> bool:
        for site in self.group.sites:
            if site.name in self.decision.quantizers:
                install(graph_module, site, self.decision.quantizers[site.name])
        for consumer, chosen in self.decision.weights.items():
            _install_weight(graph_module, consumer, chosen, self.group.plans[consumer].wbits)
        return bool(self.decision.quantizers or self.decision.weights)

    def ensures(self, graph_module: GraphModule) -> None:
        super().ensures(graph_module)
        for consumer in self.decision.weights:
            weight = consumer.args[1]
            if not isinstance(weight, Node) or weight.target is not DEQUANTIZE:
                raise PassError(f"{consumer.name} does not read integer codes")


def installed_weights(graph_module: GraphModule, plan: Plan) -> dict[Node, QuantizedWeight]:
    """The integer weights that a plan's consumers read, in its order; one whose weight is float is left out."""
    weights = {}
    for consumer in (consumer for group in plan.groups for consumer in group.consumers):
        read = consumer.args[1]
        if isinstance(read, Node) and read.target is DEQUANTIZE:
            codes, scale = (attribute(graph_module, cast(Node, constant)) for constant in read.args[:2])
            zero_point = None if read.args[2] is None else attribute(graph_module, cast(Node, read.args[2]))
            weights[consumer] = QuantizedWeight(codes, scale, zero_point, cast(int, (*read.args, 0)[5]))
    return weights


def _install_weight(graph_module: GraphModule, consumer: Node, chosen: ChosenWeight, bits: int) -> None:
    """Put codes in place of the weight: what is quantized takes a quarter of the memory from here on."""
    node = consumer.args[1]
    assert isinstance(node, Node)
    name = str(node.target)
    if chosen.bias is not None:
        replace_constant(graph_module, consumer, 2, chosen.bias, beside(name, "bias"))
    stem = free_stem(graph_module, name)
    codes = constant_node(graph_module, QUANTIZED.of(stem), chosen.weight.codes, consumer)
    scales = constant_node(graph_module, SCALE.of(stem), chosen.weight.scale, consumer)
    zeros, group = chosen.weight.zero_point, chosen.weight.group
    zero_points = None if zeros is None else constant_node(graph_module, ZERO_POINT.of(stem), zeros, consumer)
    with graph_module.graph.inserting_before(consumer):
        blocks = (1, group) if group else (0,)
        value = graph_module.graph.call_function(DEQUANTIZE, (codes, scales, zero_points, bits, *blocks))
    copy_meta(consumer, value, node.meta["val"])
    consumer.update_arg(1, value)
    drop_constant(graph_module, node)
