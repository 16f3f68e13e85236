"""The passes that bring a captured graph into the form that matchers read."""

from __future__ import annotations

from torch.fx import GraphModule

from repquant_fx.passes.base import run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.fold_constants import FoldConstants
from repquant_fx.passes.fuse_rms_norm import FuseRMSNorm


def normalize(graph_module: GraphModule) -> GraphModule:
    """Fold constants, give every operation one spelling, and recognise norms that are written out."""
    return run_passes(graph_module, [FoldConstants(), Canonicalize(), FuseRMSNorm()])
