"""The passes that bring a lowered graph into the form that runs fastest; what it computes stays."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from repquant_fx.passes.base import LeftAlone, run_passes
from repquant_fx.passes.flatten_rows import FlattenRows
from repquant_fx.passes.fuse_requantization import Codes, FuseRequantization
from repquant_fx.passes.share_masks import ShareMasks


@dataclass(frozen=True)
class RuntimeForm:
    """The graph that ships.

    Attributes:
        codes: what the Linears give that write codes, by name.
        left_alone: what was not brought into this form, and why.
    """

    graph_module: GraphModule
    codes: dict[str, Codes] = field(default_factory=dict)
    left_alone: tuple[LeftAlone, ...] = ()


def optimize_for_runtime(graph_module: GraphModule, quantizers: dict[str, Node], *,
                         adjacent: bool = False) -> RuntimeForm:
    """Integer codes out of Linears, flat token matrices, one mask for all layers.

    Args:
        quantizers: the node that produces each site's codes, by site name; brought up to date.
        adjacent: keep every quantize next to its dequantize, for containers that layout operators cannot move about
            (UINT4).
    """
    fuse = FuseRequantization(quantizers)
    passes = [*([] if adjacent else [fuse]), FlattenRows(), ShareMasks()]
    graph_module = run_passes(graph_module, passes)
    return RuntimeForm(graph_module, fuse.codes, tuple(item for each in passes for item in each.left_alone))
