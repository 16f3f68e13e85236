"""The passes that bring a captured graph into the form that matchers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from repquant_fx.passes.base import Pass, run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.fold_constants import FoldConstants
from repquant_fx.passes.fold_factors import FoldFactors
from repquant_fx.passes.fuse_rms_norm import FuseRMSNorm
from repquant_fx.passes.identity import NodeProbe

PASSES: tuple[type[Pass[Any]], ...] = (FoldConstants, Canonicalize, FuseRMSNorm, FoldFactors)


def normalize(graph_module: GraphModule, inputs: Sequence[Tensor] | None = None) -> GraphModule:
    """Fold constants, give every operation one spelling, recognise norms that are written out, fold factors.

    Args:
        inputs: of the graph, by position: its float outputs for them are compared before and after each pass; nothing
            is where None.

    Raises:
        PassError: a pass changed the outputs beyond float rounding.
    """
    return run_passes(graph_module, [each() for each in PASSES], None if inputs is None else NodeProbe(inputs))
