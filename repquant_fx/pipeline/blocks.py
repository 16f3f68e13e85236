"""Find blocks: stretches of a graph between cuts that one value alone carries past."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.passes.spec import SITE
from repquant_fx.pipeline.segments import first_computed

GROUPS = 6  # of a transformer block: q, k and v; scores; context; output; up; down


@dataclass(frozen=True)
class Block:
    """Consecutive nodes from `first` up to (not including) `stop`; `leaves` is the one value that is read behind it.

    The last block has neither `stop` nor `leaves`: it gives the outputs.
    """

    first: Node
    stop: Node | None
    leaves: Node | None


def find_blocks(graph_module: GraphModule, plan: Plan, names: set[str], groups: int = GROUPS) -> list[Block]:
    """Blocks of at least `groups` groups each, in order; together they are the graph from its first quantizer on.

    A cut is a place where of all values computed from quantized ones a single one is read later (but for those that
    only the outputs read).

    Args:
        names: of nodes at which may be cut: those that the float graph has as well.
    """
    nodes = list(graph_module.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    ends = sorted(max(order[consumer] for consumer in group.consumers) for group in plan.groups)
    last_use = {n: max((order[u] for u in n.users if u.op != "output"), default=-1) for n in nodes}
    if not plan.groups:
        return []
    first = first_computed(graph_module)
    blocks: list[Block] = []
    quantized: set[Node] = set()
    live: set[Node] = set()
    finished = 0  # groups before the last cut
    for index, node in enumerate(nodes):
        live = {n for n in live if last_use[n] >= index}
        passed = sum(end < index for end in ends)
        if (len(live) == 1 and passed - finished >= groups and len(ends) - passed >= groups and node.name in names
                and node.op == "call_function"):
            leaves = next(iter(live))
            if leaves.name in names:
                blocks.append(Block(first, node, leaves))
                first, finished = node, passed
        if SITE in node.meta or node.target is DEQUANTIZE or any(p in quantized for p in node.all_input_nodes):
            quantized.add(node)
            if isinstance(node.meta.get("val"), Tensor) and node.op != "output" and node.target is not DEQUANTIZE:
                live.add(node)
    return [*blocks, Block(first, None, None)]


def last_group(plan: Plan) -> Group:
    """The group whose layers come last in the graph."""
    order = {node: index for index, node in enumerate(plan.groups[0].consumers[0].graph.nodes)}
    return max(plan.groups, key=lambda group: max(order[consumer] for consumer in group.consumers))
