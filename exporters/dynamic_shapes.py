"""Which dimensions of a captured graph stay free when it is exported once more."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from repquant_fx.frontends.capture import AXES
from repquant_fx.torch_private import largest_size


def dynamic_shapes(graph_module: GraphModule) -> tuple[dict[int, Any] | None, ...] | None:
    """What torch.export needs to keep the symbolic dimensions of a captured graph symbolic, under the names they were
    given: for each input the free axes and their `torch.export.Dim`. None where all are fixed."""
    dims: dict[str, Any] = {}
    shapes: list[dict[int, Any] | None] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            sizes = node.meta["val"].shape
            free = {axis: dims.setdefault(name, torch.export.Dim(name, min=1, max=largest_size(sizes[axis])))
                    for axis, name in node.meta[AXES].items()}
            shapes.append(free or None)
    return tuple(shapes) if dims else None
