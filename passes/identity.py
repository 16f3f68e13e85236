"""Does a rewriting that claims a float identity keep it? What it must leave is computed before and after, on one batch.

The check of an exported file compares two forms of the *rewritten* graph: both would be wrong alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.recorder import Recorder
from repquant_fx.torch_private import pytree

# the values that a rewriting must leave as they are, by a name, in graph order
Probe = Callable[[GraphModule], Mapping[str, Any]]
ROUNDING = 1e-3  # of the largest value: float32 in another order differs by about 1e-5, a wrong constant by far more


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Name of the first value that differs beyond float rounding, and by how much; None where there is none."""
    for name, value in before.items():
        for old, new in zip(_tensors(value), _tensors(after[name]), strict=True):
            apart = deviation(old, new)
            if not apart <= ROUNDING:
                return f"{name} differs by {100 * apart:.3g} % of its largest value"
    return None


def deviation(old: Tensor, new: Tensor) -> float:
    """Largest difference, relative to the largest finite value of `old`; 0 where both are infinite or NaN alike."""
    if old.shape != new.shape:
        return float("inf")
    old, new = old.detach().double(), new.detach().double()
    alike = (old == new) | (old.isnan() & new.isnan())
    apart = torch.where(alike, torch.zeros_like(old), (old - new).abs().nan_to_num(torch.inf))
    if not apart.numel() or not bool(apart.any()):
        return 0.0
    finite = old[old.isfinite()]
    return float(apart.max() / finite.abs().max().clamp(min=1e-12)) if finite.numel() else float("inf")


def check(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """
    Raises:
        PassError: a value changed; names the first.
    """
    what = changed(before, after)
    if what is not None:
        raise PassError(f"it was to leave the float model as it is, but {what}; this is a bug of repquant-fx: "
                        "until it is mended, skip that layer in the recipe")


@torch.no_grad()
def values(graph_module: GraphModule, nodes: Mapping[str, Node], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What `nodes` give for one batch, by their names here; nothing else is kept."""
    recorder = Recorder(graph_module, nodes.values())
    recorder.run(*inputs)
    return {name: recorder.kept[node] for name, node in nodes.items() if node in recorder.kept}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
