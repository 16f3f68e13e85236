"""Quantized probabilities that sum to 1 again: each row is divided by its sum before the product that reads it.

Logarithmic codes lie up to 41 % beside a probability, and small ones become zero, so a row's sum may be a tenth off;
the error is common to all that the row averages, and the division removes it. It costs the file a sum and a division of
the probabilities.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, aten, copy_meta
from repquant_fx.passes.channel_flow import softmax_behind
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.passes.slots import log_quantizers, slot_of
from repquant_fx.passes.spec import OBSERVED
from repquant_fx.quantizers.logarithmic import SMALLEST_SUM


class NormalizeRows(Pass[None]):
    """`matmul(P, V)` becomes `matmul(P / max(sum(P), tiny), V)`, with the sum over the last axis of P, float32 of shape
    (..., rows, keys), where the quantizer of P was chosen for it.
    """

    name = "normalize rows"
    needs = "a quantizer at the group's Softmax operand"
    guarantees = "rows of probabilities whose quantizer is `normalized` reach their product with the sum 1, or all zero"
    takes = gives = OBSERVED

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for site, module in log_quantizers(graph_module, self.group):
            if module.normalized:
                for consumer in site.consumers:
                    _normalize(graph_module, slot_of(graph_module, site), consumer)
                    modified = True
        return modified


def may_normalize(site: Site) -> bool:
    """Whether each row that a product reads at a Softmax's site is one row of that Softmax."""
    return softmax_behind(site.value) is not None and all(c.args[0] is not c.args[1] for c in site.consumers)


def _normalize(graph_module: GraphModule, slot: Node, consumer: Node) -> None:
    graph, value = graph_module.graph, slot.meta["val"]
    assert isinstance(value, Tensor)
    sums = value[..., :1]
    with graph.inserting_before(consumer):
        total = copy_meta(consumer, graph.call_function(aten.sum.dim_IntList, (slot, [-1], True)), sums)
        divisor = copy_meta(consumer, graph.call_function(aten.clamp_min.default, (total, SMALLEST_SUM)), sums)
        rows = copy_meta(consumer, graph.call_function(aten.div.Tensor, (slot, divisor)), value)
    consumer.replace_input_with(slot, rows)
