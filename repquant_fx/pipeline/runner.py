"""Run segments of a graph on stored values, a batch at a time; the prefix never runs again."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx.offload import Values, cuts_of
from repquant_fx.pipeline.segments import between
from repquant_fx.recorder import naming


class SegmentRunner:
    """Runs node ranges of a graph on stored values, a batch at a time.

    Attributes:
        cuts: the values live at the node reached, one set per batch; in a file where an offload directory is given.
    """

    def __init__(
        self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]], offload_dir: str | Path | None = None
    ) -> None:
        self.graph_module = graph_module
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.cuts = cuts_of([dict(zip(placeholders, batch)) for batch in batches], offload_dir)
        self.node_executions = 0

    def run(self, first: Node, stop: Node | None, wanted: Sequence[Node]) -> Iterator[Values]:
        """For each batch, the values of `wanted`, computed from the cut with nothing run that they do not need."""
        nodes = list(between(first, stop))
        position = {node: i for i, node in enumerate(nodes)}
        for cut in self.cuts:
            needed = ancestors(wanted, position, cut)
            yield self._execute([n for n in nodes if n in needed], dict(cut), set(wanted))

    def advance(self, first: Node, stop: Node) -> None:
        """Replace each batch's cut by the values live at `stop`."""
        before = list(between(first, stop))
        position = {node: i for i, node in enumerate(before)}
        live = {
            n for n in [*before, *(self.cuts[0] if self.cuts else {})] if n.op != "get_attr" and _used_from(n, stop)
        }

        def following(cut: Values) -> Values:
            needed = ancestors([n for n in live if n in position], position, cut)
            computed = self._execute([n for n in before if n in needed], dict(cut), live)
            return {n: v for n, v in computed.items() if n in live}

        self.cuts.replace(following)

    @torch.no_grad()
    def _execute(self, nodes: list[Node], env: Values, keep: set[Node]) -> Values:
        interpreter = Interpreter(self.graph_module, garbage_collect_values=False)
        interpreter.env = env
        remaining: dict[Node, int] = {}
        for node in nodes:
            for parent in node.all_input_nodes:
                remaining[parent] = remaining.get(parent, 0) + 1
        for node in nodes:
            for parent in node.all_input_nodes:
                if parent.op == "get_attr" and parent not in env:
                    env[parent] = interpreter.run_node(parent)
            with naming(node):
                env[node] = interpreter.run_node(node)
            self.node_executions += 1
            for parent in node.all_input_nodes:
                remaining[parent] -= 1
                if not remaining[parent] and parent not in keep and parent.op != "get_attr":
                    env.pop(parent, None)
        return {n: v for n, v in env.items() if n in keep}


def _used_from(node: Node, stop: Node) -> bool:
    """Whether any reader of `node` comes at or after `stop`."""
    return any(not (user < stop) for user in node.users)


def ancestors(wanted: Sequence[Node], inside: Container[Node], available: Values) -> set[Node]:
    """Those of the nodes `inside` that `wanted` are computed from, where the values `available` are known."""
    needed: set[Node] = set()
    pending = [n for n in wanted if n not in available]
    while pending:
        node = pending.pop()
        if node in needed or node not in inside:
            continue
        needed.add(node)
        pending.extend(p for p in node.all_input_nodes if p not in available and p.op != "get_attr")
    return needed
