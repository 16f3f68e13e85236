"""Does a rewriting that claims a float identity keep it? What it must leave is computed before and after, on one batch.

The check of an exported file compares two forms of the *rewritten* graph: both would be wrong alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.recorder import Recorder, shaken
from repquant_fx.torch_private import pytree

ROUNDING = 1e-3  # of the largest value: float32 in another order differs by about 1e-5, a wrong constant by far more
SHAKE = 2.0**-20  # of a value: rounding in float32, a few times over
AMPLIFIED = 10  # a value that shaking moves by a tenth of a difference does not tell rounding from a mistake


class Probe(Protocol):
    """Computes what a rewriting must leave as it is, on one batch: values by a name, in graph order."""

    def __call__(self, graph_module: GraphModule) -> Mapping[str, Any]:
        """The values, of the graph as it is now."""
        ...

    def shaken(self, graph_module: GraphModule) -> Mapping[str, Any]:
        """The same where every float value on the way is moved by rounding: what that moves far (an argmax at a tie, a
        rounding in the model) says nothing about a rewriting.
        """
        ...


@dataclass(frozen=True)
class NodeProbe:
    """What nodes of the graph give for one batch.

    Attributes:
        nodes: those of a graph, by name; the output alone where left out.
        inputs: the graph's, by position.
    """

    inputs: Sequence[Tensor]
    nodes: Callable[[GraphModule], Mapping[str, Node]] = lambda graph_module: {
        "the output": graph_module.graph.output_node()
    }

    def __call__(self, graph_module: GraphModule) -> dict[str, Any]:
        return values(graph_module, self.nodes(graph_module), self.inputs)

    @torch.no_grad()
    def shaken(self, graph_module: GraphModule) -> dict[str, Any]:
        nodes, kept = self.nodes(graph_module), {}
        wanted = set(nodes.values())
        seeded = torch.Generator().manual_seed(0)

        def shake(node: Node, value: Any) -> Any:
            if node in wanted:
                kept[node] = value
            return shaken(value, SHAKE, seeded) if node.op == "call_function" else value

        Recorder(graph_module, graph_module.graph.nodes, shake).run(*self.inputs)
        return {name: kept[node] for name, node in nodes.items() if node in kept}


def changed(
    before: Mapping[str, Any], after: Mapping[str, Any], shaken: Callable[[], Mapping[str, Any]] | None = None
) -> str | None:
    """Name of the first value that differs beyond float rounding, and by how much; None where there is none.

    Args:
        shaken: `after`, computed anew under rounding; asked for where something differs, and what rounding moves far
            does not count.
    """
    differing = {name: apart for name, value in before.items() if not (apart := _apart(value, after[name])) <= ROUNDING}
    moved = shaken() if differing and shaken is not None else after
    for name, apart in differing.items():
        if not apart <= AMPLIFIED * _apart(after[name], moved[name]):
            return f"{name} differs by {100 * apart:.3g} % of its largest value"
    return None


def deviation(old: Tensor, new: Tensor) -> float:
    """Largest difference, relative to the largest finite value of `old`; 0 where both are infinite or NaN alike."""
    if old.shape != new.shape:
        return float("inf")
    old, new = old.detach(), new.detach()
    if not old.numel():
        return 0.0
    if old.dtype == new.dtype and old.is_floating_point():
        apart, largest = (old - new).abs_().max().item(), old.abs().max().item()
        if math.isfinite(apart) and math.isfinite(largest):
            return apart / max(largest, 1e-12) if apart else 0.0
    return _deviation_in_float64(old.double(), new.double())


def _deviation_in_float64(old: Tensor, new: Tensor) -> float:
    """`deviation` where some values are infinite or NaN, or no floats."""
    alike = (old == new) | (old.isnan() & new.isnan())
    apart = torch.where(alike, torch.zeros_like(old), (old - new).abs().nan_to_num(torch.inf))
    if not bool(apart.any()):
        return 0.0
    finite = old[old.isfinite()]
    return float(apart.max() / finite.abs().max().clamp(min=1e-12)) if finite.numel() else float("inf")


def check(
    before: Mapping[str, Any], after: Mapping[str, Any], shaken: Callable[[], Mapping[str, Any]] | None = None
) -> None:
    """
    Raises:
        PassError: a value changed (see `changed`); names the first.
    """
    what = changed(before, after, shaken)
    if what is not None:
        raise PassError(f"it was to leave the float model as it is, but {what}; this is a bug of repquant-fx: "
                        "until it is mended, skip that layer in the recipe")


@torch.no_grad()
def values(graph_module: GraphModule, nodes: Mapping[str, Node], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What `nodes` give for one batch, by their names here; nothing else is kept."""
    recorder = Recorder(graph_module, nodes.values())
    recorder.run(*inputs)
    return {name: recorder.kept[node] for name, node in nodes.items() if node in recorder.kept}


def _apart(old: Any, new: Any) -> float:
    """Largest `deviation` of the float tensors of two values."""
    pairs = zip(_tensors(old), _tensors(new), strict=True)
    return max((deviation(a, b) for a, b in pairs if a.is_floating_point()), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
