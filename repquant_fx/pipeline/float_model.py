"""The float model beside the quantized one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.offload import Values
from repquant_fx.passes.base import shared_copy
from repquant_fx.pipeline.runner import SegmentRunner
from repquant_fx.pipeline.segments import Segment


class FloatModel:
    """The float model, run beside the quantized one segment by segment: what each layer should give."""

    def __init__(
        self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]], offload_dir: str | Path | None = None
    ) -> None:
        self.graph_module = shared_copy(graph_module)
        self.runner = SegmentRunner(self.graph_module, batches, offload_dir)
        self.twin = dict(zip(graph_module.graph.nodes, self.graph_module.graph.nodes))

    def run(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[Values]:
        """For each batch, the float values of `nodes`."""
        twins = [self.twin[n] for n in nodes]
        stop = None if segment.stop is None else self.twin[segment.stop]
        for values in self.runner.run(self.twin[segment.first], stop, twins):
            yield {n: values[t] for n, t in zip(nodes, twins)}

    def advance(self, first: Node, stop: Node) -> None:
        """Go from one node of the quantized graph to another."""
        self.runner.advance(self.twin[first], self.twin[stop])
