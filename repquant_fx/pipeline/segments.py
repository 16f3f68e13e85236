"""Cut a graph into segments: consecutive nodes with the groups that are calibrated in them, where few values are
live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.caches import append_of
from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.passes.spec import SITE

WIDEST_CUT = 6.0  # a cut may hold this many times the smallest cut nearby; larger ones merge two segments
NEIGHBOURS = 6


@dataclass
class Segment:
    """Consecutive nodes from `first` up to (not including) the next segment's first, and the groups calibrated in
    them.
    """

    first: Node
    stop: Node | None
    groups: list[Group]


def cut_into_segments(graph_module: GraphModule, plan: Plan) -> list[Segment]:
    """One segment per group where the graph can be cut cheaply before it, merged where it cannot."""
    nodes = list(graph_module.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    spans = []
    slots = {name: node for node in nodes if (name := node.meta.get(SITE)) is not None}
    for group in plan.groups:
        anchors = [group.norm, group.softmax, *(slots.get(site.name) for site in group.sites)]
        start = min(order[a] for a in anchors if a is not None)
        spans.append((start, max(order[c] for c in group.consumers), group))
    spans.sort(key=lambda s: (s[0], s[1]))
    sizes = _live_sizes(nodes, order, [s[0] for s in spans])
    segments: list[tuple[int, int, list[Group]]] = []
    for index, (start, end, group) in enumerate(spans):
        nearby = sizes[max(0, index - NEIGHBOURS): index + NEIGHBOURS + 1]
        wide = sizes[index] > WIDEST_CUT * max(1.0, min(nearby))
        if segments and (start <= segments[-1][1] or wide):
            first, last, groups = segments[-1]
            segments[-1] = (first, max(last, end), [*groups, group])
        else:
            segments.append((start, end, [group]))
    result = []
    for index, (start, _, groups) in enumerate(segments):
        begin = first_computed(graph_module) if index == 0 else nodes[start]
        stop = nodes[segments[index + 1][0]] if index + 1 < len(segments) else None
        ordered = sorted(groups, key=lambda g: min(order[c] for c in g.consumers))
        result.append(Segment(begin, stop, ordered))
    return result


def _live_sizes(nodes: list[Node], order: dict[Node, int], positions: list[int]) -> list[float]:
    """Elements per sample that cross each position."""
    events = [0.0] * (len(nodes) + 1)
    for node in nodes:
        if node.op == "get_attr" or not node.users or append_of(node) is not None:  # a cache is empty here
            continue
        last = max(order[u] for u in node.users)
        size = float(_elements(node))
        events[order[node] + 1] += size
        events[last + 1] -= size
    total, running = [], 0.0
    for event in events:
        running += event
        total.append(running)
    return [total[p] for p in positions]


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return math.prod(d for d in value.shape if isinstance(d, int))


def first_computed(graph_module: GraphModule) -> Node:
    """The first node that computes something."""
    return next(node for node in graph_module.graph.nodes if node.op not in ("placeholder", "get_attr"))


def between(first: Node, stop: Node | None) -> Iterator[Node]:
    """The nodes that compute something, from `first` up to (not including) `stop`."""
    node = first
    while node is not stop and node.op != "root":
        if node.op not in ("get_attr", "placeholder", "output"):
            yield node
        node = node.next
