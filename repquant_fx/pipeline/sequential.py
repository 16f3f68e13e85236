"""Quantize group by group: decide, or take what was decided before, and rewrite the graph accordingly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx import log
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.decision import Decision
from repquant_fx.distributed import Tensors
from repquant_fx.errors import CalibrationError, RepQuantWarning
from repquant_fx.passes.base import attribute, module_path, run_pass, run_passes
from repquant_fx.passes.identity import Probe
from repquant_fx.passes.install_decision import InstallDecision
from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.passes.normalize_rows import NormalizeRows
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.passes.reparameterize_softmax import ReparameterizeSoftmax
from repquant_fx.passes.slots import install, slot_module
from repquant_fx.pipeline.choose import choose_quantizers, choose_weights
from repquant_fx.pipeline.float_model import FloatModel
from repquant_fx.pipeline.observing import moved, observe_group
from repquant_fx.pipeline.padding import Padding
from repquant_fx.pipeline.runner import SegmentRunner
from repquant_fx.pipeline.second_moments import second_moments
from repquant_fx.pipeline.segments import Segment, between, cut_into_segments
from repquant_fx.progress import progress
from repquant_fx.quantizers.observers import Passthrough
from repquant_fx.quantizers.weight import ChosenWeight
from repquant_fx.recipe import Recipe
from repquant_fx.statistics import Statistics


@dataclass(frozen=True)
class Quantized:
    """What the pipeline produced besides the rewritten graph.

    Attributes:
        latents: the float weights in their place, after the activations' reparameterization, where the recipe asks
            for reconstruction.
        errors: (round-to-nearest, chosen) output error by consumer node, on the calibration Hessian.
        notes: what the report says about a group beside the group's own notes, as sentences.
        node_executions: how many graph nodes were run in all, over all batches.
    """

    latents: Mapping[Node, Tensor]
    errors: Mapping[Node, tuple[float, float]]
    notes: Mapping[Group, tuple[str, ...]]
    node_executions: int
    segments: int


def quantize_sequentially(
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
    checkpoint: Checkpoint | None = None, offload_dir: str | Path | None = None, statistics: Statistics | None = None,
    padding: Padding | None = None,
) -> Quantized:
    """Calibrate, reparameterize and quantize every group in graph order, editing the graph in place.

    Args:
        graph_module: with observers inserted.
        batches: positional inputs of the model, one tuple per batch; all of them, on every rank.
        checkpoint: where decisions are kept and read again, and which processes work together.
        offload_dir: a folder for the values between segments; in memory where None.
        statistics: filled with what the HTML report draws, where given.
        padding: what of the batches does not count.

    Raises:
        CalibrationError: no data, or an activation that is not finite (named).
    """
    if not batches:
        raise CalibrationError("no calibration data")
    segments = cut_into_segments(graph_module, plan)
    state = _State(graph_module, segments, batches, recipe, checkpoint or Checkpoint(), offload_dir, statistics,
                   padding or Padding())
    for number, (segment, group) in enumerate(progress(state.order, total=len(plan.groups), description="quantize")):
        _quantize_group(state, segment, group, f"group-{number:04d}")
    return state.finish()


class _State:
    """What passes from group to group: the runners, how far they are, and the result so far."""

    def __init__(
        self, graph_module: GraphModule, segments: list[Segment], batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
        checkpoint: Checkpoint, offload_dir: str | Path | None, statistics: Statistics | None, padding: Padding,
    ) -> None:
        self.graph_module, self.recipe, self.checkpoint, self.statistics = graph_module, recipe, checkpoint, statistics
        self.padding = padding
        self.order = [(segment, group) for segment in segments for group in segment.groups]
        self.batches, self.mine = len(batches), checkpoint.world.shard(len(batches))
        self.device = batches[0][0].device
        shard = [batches[i] for i in self.mine]
        self.float_model = FloatModel(graph_module, shard, offload_dir) if recipe.correction else None
        self.runner = SegmentRunner(graph_module, shard, offload_dir)
        self.reached = segments[0].first if segments else None
        self.segments = len(segments)
        self.latents: dict[Node, Tensor] = {}
        self.errors: dict[Node, tuple[float, float]] = {}
        self.notes: dict[Group, tuple[str, ...]] = {}
        self.unseen = 0  # groups decided before, when no statistics were asked for
        self.reparameterizes = recipe.norm in ("reparameterize", "smooth")

    def reach(self, segment: Segment) -> None:
        """Advance to a segment, through all that were finished since (or before this process began)."""
        if self.reached is not None and self.reached is not segment.first:
            with log.part("advance"):
                self.runner.advance(self.reached, segment.first)
                if self.float_model is not None:
                    self.float_model.advance(self.reached, segment.first)
        self.reached = segment.first

    def count(self, statistics: Statistics | None) -> None:
        """Add the statistics of a group that is finished; None where it has none."""
        if self.statistics is None:
            return
        if statistics is None:
            self.unseen += 1
        else:
            self.statistics.add(statistics)

    def finish(self) -> Quantized:
        """The result, with what it took."""
        if self.unseen:
            warnings.warn(
                f"{self.unseen} of {len(self.order)} groups of layers were finished before without statistics: the "
                "page has no figures of "
                "them; take a new work directory for all",
                RepQuantWarning,
                stacklevel=2,
            )
        runners = [self.runner, *([self.float_model.runner] if self.float_model is not None else [])]
        return Quantized(self.latents, self.errors, self.notes, sum(runner.node_executions for runner in runners),
                         self.segments)


def _quantize_group(state: _State, segment: Segment, group: Group, name: str) -> None:
    """Decide about a group, or take what was decided before, and rewrite the graph accordingly."""
    stored = state.checkpoint.load(name)
    stored = None if stored is None else moved(stored, state.device)
    restored = None if stored is None else _restored(group, stored)
    statistics = None
    if state.statistics is not None:
        statistics = Statistics() if stored is None or restored is None else Statistics.from_tensors(stored)
    if restored is None:
        state.reach(segment)
        quantizers = _calibrate(state, segment, group, statistics)
    else:
        quantizers = dict(restored.quantizers)
    probe = _GroupProbe(state.runner, segment, group) if restored is None and group.norm is not None else None
    _rewrite_activations(state, group, quantizers, probe)
    weights: dict[Node, ChosenWeight] = {}
    if group.kind != "matmul":
        weights = _choose_weights(state, segment, group, statistics) if restored is None else dict(restored.weights)
        if state.recipe.reconstruct:
            state.latents |= {c: attribute(state.graph_module, cast(Node, c.args[1])) for c in weights}
        run_passes(state.graph_module, [InstallDecision(group, Decision(weights=weights))])
    state.errors |= {c: chosen.errors for c, chosen in weights.items() if chosen.errors is not None}
    state.count(statistics)
    if restored is None:
        figures = {} if statistics is None else statistics.to_tensors()
        state.checkpoint.save(name, Decision(quantizers, weights).to_tensors(group) | figures)


def _restored(group: Group, tensors: Tensors) -> Decision | None:
    """The decision that was kept about a group; None, with a warning, where the tensors do not fit it."""
    try:
        decision = Decision.from_tensors(group, tensors)
        if not decision.is_complete(group):
            raise ValueError("weights are missing")
        return decision
    except (KeyError, ValueError) as error:
        warnings.warn(f"what the work directory holds about {group.path} does not fit ({error}) and is made anew",
                      RepQuantWarning, stacklevel=2)
        return None


def _calibrate(state: _State, segment: Segment, group: Group, statistics: Statistics | None) -> dict[str, nn.Module]:
    """Observe a group's sites on all batches and choose their quantizers, by site name; rank 0's choice holds."""
    graph_module, world = state.graph_module, state.checkpoint.world
    with log.part("observe"):
        observers = observe_group(graph_module, group, state.runner, segment, state.mine, state.batches, world,
                                  state.padding)
    with log.part("choose scales"):
        if world.size == 1:
            quantizers = choose_quantizers(graph_module, group, state.recipe)
        else:
            sent = world.broadcast(
                lambda: Decision(choose_quantizers(graph_module, group, state.recipe)).to_tensors(group)
            )
            assert sent is not None
            quantizers = dict(Decision.from_tensors(group, moved(sent, state.device)).quantizers)
    if statistics is not None:
        statistics.observe(group.sites, observers, quantizers, reparameterized=state.reparameterizes)
    return quantizers


def _rewrite_activations(state: _State, group: Group, quantizers: dict[str, nn.Module], probe: Probe | None) -> None:
    """Install the quantizers, and bring them to the form in which the graph is lowered.

    `probe` says what the float model gives where that is to be checked.
    """
    run_passes(state.graph_module, [InstallDecision(group, Decision(quantizers))])
    if state.reparameterizes:
        note = run_pass(state.graph_module, ReparameterizeNorms(group, symmetric=state.recipe.symmetric), probe)
        state.notes[group] = () if note is None else (note,)
    run_passes(state.graph_module, [NormalizeRows(group), ReparameterizeSoftmax(group)])


@dataclass(frozen=True)
class _GroupProbe:
    """What the first batch gives at a group's consumers, and all else that leaves the segment, without the group's
    quantizers.

    Groups behind this one are not calibrated yet and hold observers: no code lies between that could flip. A group that
    is restored is not run: the same rewriting was compared when it was decided.
    """

    runner: SegmentRunner
    segment: Segment
    group: Group

    def __call__(self, graph_module: GraphModule) -> dict[str, Any]:
        segment, group = self.segment, self.group
        inside = dict.fromkeys(between(segment.first, segment.stop))
        leaving = [
            n for n in inside if any(u not in inside and u.target is not torch.ops.aten.sym_size.int for u in n.users)
        ]
        wanted = {f"{n.name} in {module_path(n)}, behind {group.path},": n for n in group.consumers}
        wanted |= {n.name: n for n in leaving}
        quantizers = {site: slot_module(graph_module, site) for site in group.sites}
        for site in group.sites:
            install(graph_module, site, Passthrough())
        computed = next(self.runner.run(segment.first, segment.stop, list(wanted.values())), {})
        for site, quantizer in quantizers.items():
            install(graph_module, site, quantizer)
        return {name: computed[node] for name, node in wanted.items() if node in computed}

    def shaken(self, graph_module: GraphModule) -> dict[str, Any]:
        """As it is: nothing is excused."""
        return self(graph_module)


def _choose_weights(
    state: _State, segment: Segment, group: Group, statistics: Statistics | None
) -> dict[Node, ChosenWeight]:
    """The integer weights of a group's consumers, on the second moments over all ranks' batches."""
    world = state.checkpoint.world
    with log.part("second moments"):
        moments = second_moments(state.runner, state.float_model, segment, group, state.recipe, state.mine,
                                 state.padding)
        world.all_reduce(moments.tensors())
    with log.part("quantize weights"):
        return choose_weights(
            state.graph_module, group, state.recipe, moments, world, None if statistics is None else statistics.weights
        )
