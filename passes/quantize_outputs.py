"""Quantize an output of the model before it is transposed, not after.

`output -> transpose -> quantize` is the same as `output -> quantize -> transpose`. ONNX Runtime brings the first into
the second form by itself, and where nothing else reads the output, what it then gives out is the dequantized value.
Written in the second form the output stays as it was computed.
"""

from __future__ import annotations

from typing import cast

from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, attribute, copy_meta
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import LAYOUT, QUANTIZE, SIZED, TRANSPOSES
from repquant_fx.passes.spec import RUNTIME


class QuantizeOutputs(Pass[None]):
    """Codes are uint8 in the shape of the output, and moved about as its float32 values were."""

    name = "quantize outputs"
    needs = "a graph lowered to Q/DQ"
    guarantees = "no transpose alone reads an output of the model for a quantizer; every code and output is the same"
    takes = gives = RUNTIME

    def run(self, graph_module: GraphModule) -> bool:
        outputs = set(graph_module.graph.output_node().all_input_nodes)
        modified = False
        for quantize in list(graph_module.graph.find_nodes(op="call_function", target=QUANTIZE)):
            moves = _moves(quantize, outputs)
            if not any(move.target in TRANSPOSES for move in moves):
                continue
            if attribute(graph_module, cast(Node, quantize.args[1])).ndim:
                self.leave(quantize, "it has a scale per channel, which a transpose would have to move along")
                continue
            _quantize_first(quantize, moves)
            modified = True
        if modified:
            refresh_metadata(graph_module)
        return modified


def _moves(quantize: Node, outputs: set[Node]) -> list[Node]:
    """The layout operators between an output of the model and a quantizer, the first of them first; none where
    something else reads what is between.
    """
    found: list[Node] = []
    value = cast(Node, quantize.args[0])
    while value not in outputs:
        if value.target not in LAYOUT or len(_readers(value)) > 1:
            return []
        found.insert(0, value)
        value = cast(Node, value.args[0])
    others = [reader for reader in _readers(value) if reader.op != "output"]
    return found if len(others) == 1 else []


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if user.target not in SIZED]


def _quantize_first(quantize: Node, moves: list[Node]) -> None:
    """Put a quantizer before operators; its readers get the codes that these give."""
    first, last = moves[0], moves[-1]
    quantize.replace_all_uses_with(last)
    for node in (*quantize.all_input_nodes[1:], quantize):
        first.prepend(node)
    quantize.update_arg(0, first.args[0])
    first.update_arg(0, quantize)
    copy_meta(first, quantize)
