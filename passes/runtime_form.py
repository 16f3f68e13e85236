"""The passes that bring a lowered graph into the form that runs fastest; what it computes stays."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, run_passes
from repquant_fx.passes.flatten_rows import FlattenRows
from repquant_fx.passes.fuse_requantization import FuseRequantization
from repquant_fx.passes.share_masks import ShareMasks


def optimize_for_runtime(graph_module: GraphModule, quantizers: dict[str, Node], *, adjacent: bool = False) -> GraphModule:
    """Integer codes out of Linears, flat token matrices, one mask for all layers.

    Args:
        quantizers: the node that produces each site's codes, by site name; brought up to date.
        adjacent: keep every quantize next to its dequantize, for containers that layout operators cannot move about (UINT4).
    """
    fuse: list[Pass] = [] if adjacent else [FuseRequantization(quantizers)]
    return run_passes(graph_module, [*fuse, FlattenRows(), ShareMasks()])
