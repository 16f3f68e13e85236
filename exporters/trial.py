"""Can a graph be written as ONNX? Asked before it is quantized, which may take hours.

Its operators are looked up in the exporter's table. Where one is missing there, which may still be decomposed into
others, or where the model is not so small that quantizing it takes no longer, the float graph is translated as the
lowered one will be, and the result thrown away. Tensors are referred to, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.exporters.onnx_qdq import OPSET, UnwritableError, copy_outputs, translate
from repquant_fx.exporters.translations import translation_table
from repquant_fx.passes.base import module_path, shared_copy
from repquant_fx.security.escape import printable
from repquant_fx.torch_private import OpOverload, translated_operators

TRIED_FROM = 1_000_000  # elements of all tensors


def try_translation(
    graph_module: GraphModule, example_inputs: Sequence[Tensor], *, input_names: Sequence[str],
    output_names: Sequence[str], dynamic_shapes: object = None,
) -> None:
    """Make sure that a graph in normal form has an ONNX form; it stays as it is.

    Args:
        example_inputs, input_names, output_names, dynamic_shapes: see `onnx_qdq.export_onnx`.

    Raises:
        UnwritableError: it has none; the message names the operator, its node and its module.
        ExportError: torch cannot export it.
    """
    doubtful = untranslated(graph_module)
    tensors = [*graph_module.parameters(), *graph_module.buffers()]
    if not doubtful and sum(tensor.numel() for tensor in tensors) < TRIED_FROM:
        return
    tried = shared_copy(graph_module)
    copy_outputs(tried)
    tried.recompile()  # passes leave that to the first call
    try:
        translate(tried, example_inputs, input_names, output_names, dynamic_shapes)
    except UnwritableError as error:
        raise UnwritableError(f"{error}{_place(str(error), doubtful)}") from error


def untranslated(graph_module: GraphModule) -> list[Node]:
    """Nodes whose operator has no translation of its own."""
    known, own = translated_operators(OPSET), translation_table()
    return [
        node for node in graph_module.graph.nodes
        if isinstance(node.target, OpOverload) and node.target not in own and node.target.name() not in known
    ]


def _place(message: str, doubtful: Sequence[Node]) -> str:
    """Where the operator stands that an error speaks of: the one it names, or else the first one without a rule, which
    may be what was decomposed into it."""
    node = next((node for node in doubtful if _name(node) in message), next(iter(doubtful), None))
    if node is None:
        return ""
    where = module_path(node)
    return printable(f"; the node {node.name} ({node.target})" + (f" of the module {where}" if where else ""))


def _name(node: Node) -> str:
    return str(node.target).split(".")[1]
