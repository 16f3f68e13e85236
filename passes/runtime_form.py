"""The passes that bring a lowered graph into the form that runs fastest; what it computes stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from repquant_fx.passes.base import LeftAlone, Pass, run_pass, run_passes
from repquant_fx.passes.flatten_rows import FlattenRows
from repquant_fx.passes.fuse_requantization import Fused, FuseRequantization
from repquant_fx.passes.quantize_outputs import QuantizeOutputs
from repquant_fx.passes.share_masks import ShareMasks
from repquant_fx.passes.store_caches import StoreCaches
from repquant_fx.quantizers.requantization import Codes


@dataclass(frozen=True)
class RuntimeForm:
    """The graph that ships.

    Attributes:
        quantizers: the node that produces each site's codes, by site name.
        codes: what the Linears give that write codes, by name.
        caches: how each key/value cache is kept, by the input's name; see `StoreCaches`.
        left_alone: what was not brought into this form, and why.
    """

    graph_module: GraphModule
    quantizers: dict[str, Node]
    codes: dict[str, Codes]
    caches: dict[str, dict[str, Any]]
    left_alone: tuple[LeftAlone, ...]


def optimize_for_runtime(graph_module: GraphModule, quantizers: dict[str, Node], *, adjacent: bool = False,
                         flat: bool = True, float_caches: bool = False) -> RuntimeForm:
    """Caches of codes, integer codes out of Linears, outputs quantized before they are transposed, flat token matrices,
    one mask for all layers.

    Args:
        quantizers: the node that produces each site's codes in the lowered graph, by site name.
        adjacent: keep every quantize next to its dequantize, for containers that layout operators cannot move about
            (UINT4).
        flat: Linears on flat token matrices, which write the codes of what they feed; else tokens keep their axes, and
            every operand is quantized where it is read. Runtimes differ in which of the two they fuse.
        float_caches: keep keys and values in float32.
    """
    store = StoreCaches(quantizers, codes=not (float_caches or adjacent))
    stored = run_pass(graph_module, store)
    fuse = FuseRequantization(stored.quantizers)
    others: list[Pass[Any]] = [
        *([] if adjacent else [QuantizeOutputs()]), *([FlattenRows()] if flat else []), ShareMasks()
    ]
    fused = run_pass(graph_module, fuse) if flat and not adjacent else Fused(stored.quantizers, {})
    graph_module = run_passes(graph_module, others)
    ran: list[Pass[Any]] = [store, fuse, *others]
    left_alone = tuple(item for each in ran for item in each.left_alone)
    return RuntimeForm(graph_module, fused.quantizers, fused.codes, stored.kept, left_alone)
