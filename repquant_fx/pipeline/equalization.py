"""Cross-layer equalization: level channels between layers by one run of the float model over the calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.checkpoint import Checkpoint
from repquant_fx.distributed import Tensors, World
from repquant_fx.passes.base import module_path, run_passes
from repquant_fx.passes.equalize_layers import Equalizable, EqualizeLayers, channel_rows, describe, find_equalizable
from repquant_fx.passes.identity import NodeProbe
from repquant_fx.passes.insert_observers import CHANNEL_SAMPLE
from repquant_fx.passes.match_sites import Plan, Site
from repquant_fx.pipeline.observing import check_finite, merge_observers
from repquant_fx.pipeline.padding import Padding
from repquant_fx.progress import progress
from repquant_fx.quantizers.clipping import Bounds, search_bounds
from repquant_fx.quantizers.counted import picked
from repquant_fx.quantizers.equalization import equalize
from repquant_fx.quantizers.observers import Observer
from repquant_fx.recipe import Recipe
from repquant_fx.recorder import Recorder

PARTS = ("low", "up", "error")  # of the bounds of each site, as they are kept


def equalize_layers(graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
                  checkpoint: Checkpoint | None = None, padding: Padding | None = None) -> Plan:
    """Rewrite the matched float graph in place (see `passes.equalize_layers`). Call before observers are inserted.

    Args:
        padding: what of the batches does not count.

    Returns:
        the plan with what there is to report, or the plan given where nothing was rewritten.

    Raises:
        CalibrationError: an activation is not finite (named).
    """
    checkpoint = checkpoint or Checkpoint()
    if not recipe.equalize or not batches:
        return plan
    equalizable = find_equalizable(graph_module, plan, recipe.equalize)
    sites = {site.name: site for group in plan.groups for site in group.sites if site.name in equalizable.sites}
    if not sites:
        return plan
    tensors = checkpoint.load("equalize")
    if tensors is None or tensors.keys() != {f"{part}.{name}" for part in PARTS for name in sites}:
        tensors = _channel_bounds(graph_module, sites, equalizable, batches, checkpoint.world, padding or Padding())
        checkpoint.save("equalize", tensors)
    bounds = {
        name: (equalizable.sites[name].reshape(-1), Bounds(*(tensors[f"{part}.{name}"] for part in PARTS)))
        for name in equalizable.sites
    }
    equalization = equalize(bounds, equalizable.signed, equalizable.shiftable)
    shard = checkpoint.world.shard(len(batches))
    probe = NodeProbe(batches[shard[0]], partial(_must_stay, equalizable)) if len(shard) else None
    run_passes(graph_module, [EqualizeLayers(equalizable, equalization)], probe)
    return describe(plan, equalizable)


def _must_stay(equalizable: Equalizable, graph_module: GraphModule) -> dict[str, Node]:
    """What equalization must leave as it is: the Linears that undo factors and carry none themselves, and the
    outputs.
    """
    readers = {f"{n.name} in {module_path(n)}": n for n in equalizable.columns if n not in equalizable.rows}
    return {**readers, "the output": graph_module.graph.output_node()}


def _channel_bounds(
    graph_module: GraphModule,
    sites: Mapping[str, Site],
    equalizable: Equalizable,
    batches: Sequence[tuple[Tensor, ...]],
    world: World,
    padding: Padding,
) -> Tensors:
    """Clipping bounds of every channel of the sites in the float model, float32, shape (C,) each, in the order of its
    pattern.
    """
    observers = {name: Observer(True, CHANNEL_SAMPLE) for name in sites}
    wanted: dict[Node, list[str]] = {}
    mine = world.shard(len(batches))
    for name, site in sites.items():
        observers[name].start(len(batches), mine)
        wanted.setdefault(site.value, []).append(name)

    def record(number: int, node: Node, value: Any) -> Any:
        counts = padding.counts(number, node.name)
        for name in wanted[node]:
            pattern = equalizable.sites[name]
            which = None if counts is None else channel_rows(counts.expand(value.shape), pattern).any(-1)
            observers[name](picked(channel_rows(value, pattern), which))
        return value

    with torch.no_grad():
        for number in progress(mine, total=len(mine), description="equalize"):
            Recorder(graph_module, wanted, partial(record, number)).run(*batches[number])
    merge_observers(list(observers.values()), world)

    def search() -> Tensors:
        samples = {name: observers[name].sample() for name in sites}  # with the extremes of all data
        for name, sample in samples.items():
            check_finite(sample, name)
        bounds = {name: search_bounds(samples[name], site.bits) for name, site in sites.items()}
        return {f"{part}.{name}": getattr(bound, part) for name, bound in bounds.items() for part in PARTS}

    tensors = world.broadcast(search)
    assert tensors is not None
    return tensors
