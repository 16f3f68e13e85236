"""Keep key/value caches as integer codes: quantize keys and values before they are appended, not at every step all
that was appended.

`cat(cache, keys) -> repeat heads, transpose -> quantize -> dequantize -> MatMul` becomes `cat(cache, quantize(keys)) ->
repeat heads, transpose -> dequantize -> MatMul`, and the cache an input of uint8. Quantizing commutes with moving
elements: for no cache, and for one that this graph gave before, the codes that the products read are the same.

The Concats become outputs, in the order of the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Made, Pass, aten, attribute, copy_meta
from repquant_fx.passes.caches import appended, caches
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import MOVES, QUANTIZE
from repquant_fx.passes.spec import LOWERED, RUNTIME
from repquant_fx.torch_private import fake_mode, propagating

_MOVES_ALONE = MOVES - {aten.cat.default, aten.stack.default}  # one tensor


@dataclass(frozen=True)
class Stored:
    """Where codes come from now, and how each cache is kept.

    Attributes:
        quantizers: the node that produces each site's codes, by site name.
        kept: by the input's name, float32 or uint8 with the scale and zero point that its codes have.
    """

    quantizers: dict[str, Node]
    kept: dict[str, dict[str, Any]]


class StoreCaches(Pass[Stored]):
    """Caches are float32 of any shape, or uint8 where `codes` is set and one per-tensor quantizer reads what a cache
    and new values make together.

    Args:
        quantizers: of `Lowered`.
    """

    name = "store caches"
    needs = "a graph lowered to Q/DQ"
    guarantees = "what is appended to each cache is an output; codes are the same where a cache is empty"
    takes, gives = LOWERED, RUNTIME

    def __init__(self, quantizers: dict[str, Node], *, codes: bool = True) -> None:
        super().__init__()
        self.quantizers, self.codes = quantizers, codes

    def run(self, graph_module: GraphModule) -> Made[Stored]:
        found = caches(graph_module)
        stored = Stored(dict(self.quantizers), {str(cache.target): {"dtype": "float32"} for cache in found})
        if not found:
            return Made(False, stored)
        for cache, append in found.items() if self.codes else ():
            quantizers = _quantizers(append)
            if why := _obstacle(graph_module, quantizers):
                self.leave(append, f"the cache {cache.target} stays in float32: {why}")
                continue
            moved = _quantize_before(graph_module, cache, append, quantizers)
            stored.quantizers.update({n: moved for n, node in stored.quantizers.items() if node in quantizers})
            stored.kept[str(cache.target)] = {
                "dtype": "uint8", "scale": float(attribute(graph_module, cast(Node, moved.args[1]))),
                "zero_point": int(attribute(graph_module, cast(Node, moved.args[2]))), "bits": moved.args[3]}
        output = graph_module.graph.output_node()
        given = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
        output.args = ((*given, *found.values()),)
        refresh_metadata(graph_module)
        return Made(True, stored)


def stored_as(graph_module: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs in the dtypes that a graph takes them in: caches, which are empty or made up, as codes."""
    nodes = graph_module.graph.find_nodes(op="placeholder")
    return [tensor.to(node.meta["val"].dtype) for node, tensor in zip(nodes, inputs, strict=True)]


def _quantizers(append: Node) -> list[Node]:
    """What quantizes the values of a Concat, moved about; none where anything else reads them."""
    found: list[Node] = []
    for node in _moved(append):
        for user in node.users:
            if user.target is QUANTIZE and user.args[0] is node:
                found.append(user)
            elif user.target not in _MOVES_ALONE and user.target is not aten.sym_size.int:
                return []
    return found


def _moved(node: Node) -> Iterator[Node]:
    """A node, and what only moves its values."""
    yield node
    for user in node.users:
        if user.target in _MOVES_ALONE:
            yield from _moved(user)


def _obstacle(graph_module: GraphModule, quantizers: Sequence[Node]) -> str:
    """Why its codes cannot be kept; '' where they can."""
    if not quantizers:
        return "not only products of quantized operands read it"
    grids = [tuple(attribute(graph_module, cast(Node, q.args[i])) for i in (1, 2)) for q in quantizers]
    if any(scale.ndim for scale, _ in grids):
        return "it is quantized per channel"
    if len({(float(scale), int(zero)) for scale, zero in grids}) > 1 or len({q.args[3] for q in quantizers}) > 1:
        return "several products read it, each with a scale of its own"
    return ""


def _quantize_before(graph_module: GraphModule, cache: Node, append: Node, old: Sequence[Node]) -> Node:
    """Put one quantizer in front of a Concat, and let codes pass everything behind it; the quantizer."""
    graph, new = graph_module.graph, cast(Node, appended(append))
    with graph.inserting_before(append):
        grid = [graph.get_attr(str(cast(Node, old[0].args[i]).target)) for i in (1, 2)]
        codes = copy_meta(old[0], graph.call_function(QUANTIZE, (new, *grid, *old[0].args[3:])))
    for node, source in zip(grid, old[0].args[1:3]):
        node.meta["val"] = cast(Node, source).meta["val"]
    append.args = ([cache, codes], *append.args[1:])
    value = cache.meta["val"]
    with propagating(cast(Any, fake_mode(value))):
        cache.meta["val"] = torch.empty_like(value, dtype=torch.uint8)
    for quantize in old:
        quantize.replace_all_uses_with(cast(Node, quantize.args[0]))
        graph.erase_node(quantize)
    return codes
