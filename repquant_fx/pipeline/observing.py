"""Observe the sites of a group on all calibration data, across processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from repquant_fx.distributed import World
from repquant_fx.errors import CalibrationError
from repquant_fx.passes.match_sites import Group
from repquant_fx.passes.slots import slot_module, slot_of
from repquant_fx.pipeline.padding import Padding
from repquant_fx.pipeline.runner import SegmentRunner
from repquant_fx.pipeline.segments import Segment
from repquant_fx.quantizers.observers import Observer


def observe_group(
    graph_module: GraphModule,
    group: Group,
    runner: SegmentRunner,
    segment: Segment,
    numbers: range,
    total: int,
    world: World,
    padding: Padding,
) -> dict[str, Observer]:
    """Fill the observers in a group's slots; gives them by site name, each holding what all ranks' recorded.

    Args:
        numbers: of the runner's batches among all `total`.
        padding: what is not recorded.

    Raises:
        CalibrationError: an activation is not finite (named).
    """
    modules = {site.name: slot_module(graph_module, site) for site in group.sites}
    observers = {name: module for name, module in modules.items() if isinstance(module, Observer)}
    slots = {slot_of(graph_module, site): site for site in group.sites}
    for site in group.sites:
        if site.name in observers:
            observers[site.name].start(total, numbers, partial(padding.counts, name=site.value.name))
    if not observers:
        return {}
    for values in runner.run(segment.first, segment.stop, list(slots)):
        for slot, site in slots.items():
            check_finite(values[slot], site.name)
    merge_observers(list(observers.values()), world)
    return observers


def check_finite(values: Tensor, name: str) -> None:
    """
    Raises:
        CalibrationError: a value of the site `name` is infinite or no number.
    """
    # a sum that is finite has finite terms, and needs no memory; one that is not may be of terms that are
    if not math.isfinite(values.sum()) and not bool(torch.isfinite(values).all()):
        raise CalibrationError(f"the activation at {name} is not finite on the calibration data; "
                               "check the data and the model's weights")


def merge_observers(observers: Sequence[Observer], world: World) -> None:
    """Let every rank's observers hold what all ranks' recorded."""
    if world.size > 1:
        for each in observers:
            recorded = each.recorded()
            device = next(iter(recorded.values())).device if recorded else torch.device("cpu")
            each.merge([moved(part, device) for part in world.all_gather(recorded)])


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What was read from a file or came from another process, where this one computes."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
