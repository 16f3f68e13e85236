"""The passes that bring a captured graph into the form that matchers read."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from repquant_fx.passes.base import Pass, run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.fold_constants import FoldConstants
from repquant_fx.passes.fold_factors import FoldFactors
from repquant_fx.passes.fuse_rms_norm import FuseRMSNorm

PASSES: tuple[type[Pass[Any]], ...] = (FoldConstants, Canonicalize, FuseRMSNorm, FoldFactors)


def normalize(graph_module: GraphModule) -> GraphModule:
    """Fold constants, give every operation one spelling, recognise norms that are written out, fold factors."""
    return run_passes(graph_module, [each() for each in PASSES])
