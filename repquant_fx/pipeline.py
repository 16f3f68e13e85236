"""The sequential pipeline (RepQuant Algorithm 1): groups in graph order, each calibrated on what the quantized prefix produces.

The graph is cut where few values are live. Only the cut values of all calibration batches are kept; one segment runs at a time
and the prefix never runs again, so cost grows linearly with depth and memory is bounded by one segment and its cut values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx.errors import CalibrationError
from repquant_fx.passes.absorb_scales import AbsorbScales, channel_rows, find_absorbable
from repquant_fx.passes.base import run_passes, shared_copy
from repquant_fx.passes.calibrate_activations import CalibrateActivations, slot_module
from repquant_fx.passes.insert_observers import CHANNEL_SAMPLE
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.passes.quantize_weights import QuantizeWeights
from repquant_fx.passes.record_statistics import RecordStatistics
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.passes.reparameterize_softmax import ReparameterizeSoftmax
from repquant_fx.progress import progress
from repquant_fx.quantizers.clipping import search_bounds
from repquant_fx.quantizers.correction import Moments
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import Observer
from repquant_fx.recipe import Recipe
from repquant_fx.statistics import Statistics

Values = dict[Node, Any]
Halves = tuple[Moments, Moments]
WIDEST_CUT = 6.0  # a cut may hold this many times the smallest cut nearby; larger ones merge two segments
NEIGHBOURS = 6


@dataclass
class Segment:
    """Consecutive nodes from `first` up to (not including) the next segment's first, and the groups calibrated in them."""

    first: Node
    stop: Node | None
    groups: list[Group]


@dataclass
class Quantized:
    """What the pipeline produced besides the rewritten graph.

    Attributes:
        weights: integer weights by consumer node.
        errors: (round-to-nearest, chosen) output error by consumer node, on the calibration Hessian.
        node_executions: how many graph nodes were run in all, over all batches.
    """

    weights: dict[Node, QuantizedWeight] = field(default_factory=dict)
    errors: dict[Node, tuple[float, float]] = field(default_factory=dict)
    node_executions: int = 0
    segments: int = 0


def absorb_scales(graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe) -> bool:
    """Level channels between layers (see `passes.absorb_scales`), by one run of the float model over the calibration data.

    Call before observers are inserted. Returns whether anything was rewritten.
    """
    if not recipe.absorb or not batches:
        return False
    absorbable = find_absorbable(graph_module, plan, recipe.absorb)
    sites = {site.name: site for group in plan.groups for site in group.sites if site.name in absorbable.sites}
    if not sites:
        return False
    observers = {name: Observer(True, CHANNEL_SAMPLE) for name in sites}
    wanted: dict[Node, list[str]] = {}
    for name, site in sites.items():
        observers[name].start(len(batches))
        wanted.setdefault(site.value, []).append(name)

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            for name in wanted.get(n, ()):
                observers[name](channel_rows(value, absorbable.sites[name]))
            return value

    recorder = Record(graph_module)
    with torch.no_grad():
        for batch in progress(batches, total=len(batches), description="absorb"):
            recorder.run(*batch)
    bounds = {name: search_bounds(observers[name].sample(), site.bits) for name, site in sites.items()}
    for name, bound in bounds.items():
        if not bool(torch.isfinite(bound.low).all() and torch.isfinite(bound.up).all()):
            raise CalibrationError(f"the activation at {name} is not finite on the calibration data; check the data and the model's weights")
    run_passes(graph_module, [AbsorbScales(plan, absorbable, bounds)])
    return True


class SegmentRunner:
    """Runs node ranges of a graph on stored values, a batch at a time."""

    def __init__(self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self.graph_module = graph_module
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.cuts: list[Values] = [dict(zip(placeholders, batch)) for batch in batches]
        self.node_executions = 0

    def run(self, first: Node, stop: Node | None, wanted: Sequence[Node]) -> Iterator[Values]:
        """For each batch, the values of `wanted`, computed from the cut with nothing run that they do not need."""
        nodes = list(_between(first, stop))
        position = {node: i for i, node in enumerate(nodes)}
        for cut in self.cuts:
            needed = _ancestors(wanted, position, cut)
            yield self._execute([n for n in nodes if n in needed], dict(cut), set(wanted))

    def advance(self, first: Node, stop: Node) -> None:
        """Replace each batch's cut by the values live at `stop`."""
        before = list(_between(first, stop))
        live = {n for n in [*before, *(self.cuts[0] if self.cuts else {})] if n.op != "get_attr" and _used_from(n, stop)}
        for index, cut in enumerate(self.cuts):
            position = {node: i for i, node in enumerate(before)}
            needed = _ancestors([n for n in live if n in position], position, cut)
            computed = self._execute([n for n in before if n in needed], dict(cut), live)
            self.cuts[index] = {n: v for n, v in computed.items() if n in live}

    @torch.no_grad()
    def _execute(self, nodes: list[Node], env: Values, keep: set[Node]) -> Values:
        interpreter = Interpreter(self.graph_module, garbage_collect_values=False)
        interpreter.env = env
        remaining: dict[Node, int] = {}
        for node in nodes:
            for parent in node.all_input_nodes:
                remaining[parent] = remaining.get(parent, 0) + 1
        for node in nodes:
            for parent in node.all_input_nodes:
                if parent.op == "get_attr" and parent not in env:
                    env[parent] = interpreter.run_node(parent)
            env[node] = interpreter.run_node(node)
            self.node_executions += 1
            for parent in node.all_input_nodes:
                remaining[parent] -= 1
                if not remaining[parent] and parent not in keep and parent.op != "get_attr":
                    env.pop(parent, None)
        return {n: v for n, v in env.items() if n in keep}


def quantize_sequentially(
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe, statistics: Statistics | None = None
) -> Quantized:
    """Calibrate, reparameterize and quantize every group in graph order, editing the graph in place.

    Args:
        graph_module: with observers inserted.
        batches: positional inputs of the model, one tuple a batch.
        statistics: filled with what the HTML report draws, where given.

    Raises:
        CalibrationError: no data, or an activation that is not finite (named).
    """
    if not batches:
        raise CalibrationError("no calibration data")
    reference = Reference(graph_module, batches) if recipe.correction else None
    runner = SegmentRunner(graph_module, batches)
    result = Quantized()
    segments = cut_into_segments(graph_module, plan)
    result.segments = len(segments)
    bar = progress([None] * len(plan.groups), total=len(plan.groups), description="quantize")
    ticks = iter(bar)
    for segment in segments:
        for group in segment.groups:
            next(ticks, None)
            _quantize_group(runner, reference, segment, group, recipe, result, statistics)
        if segment.stop is not None:
            runner.advance(segment.first, segment.stop)
            if reference is not None:
                reference.advance(segment)
    for _ in ticks:
        pass
    result.node_executions = runner.node_executions + (reference.runner.node_executions if reference is not None else 0)
    return result


def _quantize_group(runner: SegmentRunner, reference: Reference | None, segment: Segment, group: Group, recipe: Recipe,
                    result: Quantized, statistics: Statistics | None) -> None:
    graph_module = runner.graph_module
    slots = [site.slot for site in group.sites if site.slot is not None]
    observers = [m for m in (slot_module(graph_module, s) for s in group.sites) if isinstance(m, Observer)]
    for each in observers:
        each.start(len(runner.cuts))
    for values in runner.run(segment.first, segment.stop, slots):
        for site in group.sites:
            if site.slot is not None and not bool(torch.isfinite(values[site.slot]).all()):
                raise CalibrationError(f"the activation at {site.name} is not finite on the calibration data; "
                                       "check the data and the model's weights")
    passes: list[Any] = [CalibrateActivations(group, recipe)]
    reparameterized = recipe.norm in ("reparameterize", "smooth")
    if statistics is not None:
        passes.append(RecordStatistics(graph_module, group, statistics, reparameterized=reparameterized))
    if reparameterized:
        passes.append(ReparameterizeNorms(group))
    passes.append(ReparameterizeSoftmax(group))
    run_passes(graph_module, passes)
    if group.kind == "matmul":
        return
    hessians, corrections = _second_moments(runner, reference, segment, group, recipe)
    pass_ = QuantizeWeights(group, recipe, hessians, corrections, statistics)
    run_passes(graph_module, [pass_])
    result.weights.update(pass_.weights)
    result.errors.update(pass_.errors)


def _second_moments(runner: SegmentRunner, reference: Reference | None, segment: Segment, group: Group,
                    recipe: Recipe) -> tuple[dict[str, Tensor], dict[Node, Halves]]:
    """What GPTQ and the correction need: `2 X^T X` a site and the moments of each consumer's missing output."""
    hessians: dict[str, Tensor] = {}
    moments: dict[Node, Halves] = {}
    use_gptq = recipe.gptq and any(plan.gptq for plan in group.plans.values())
    if not use_gptq and reference is None:
        return hessians, moments
    sites = [site for site in group.sites if site.slot is not None]
    slots = [site.slot for site in sites if site.slot is not None]
    inside = set(_between(segment.first, segment.stop))
    compared = {c: _compared(c, inside) for c in group.consumers}
    wanted = [*slots, *compared.values()] if reference is not None else slots
    targets = reference.run(segment, list(compared.values())) if reference is not None else itertools.repeat(None)
    for index, (values, target) in enumerate(zip(runner.run(segment.first, segment.stop, wanted), targets)):
        for site in sites:
            assert site.slot is not None
            x = _as_rows(values[site.slot], site)
            if x is None:
                continue
            if target is None:
                update = 2 * (x.T @ x).double()
                hessians[site.name] = hessians[site.name] + update if site.name in hessians else update
                continue
            for consumer in site.consumers:
                node = compared[consumer]
                residual = _output_rows(target[node] - values[node], consumer)
                moments.setdefault(consumer, (Moments(), Moments()))[index % 2].add(x, residual)
    return hessians, moments


def _compared(consumer: Node, inside: set[Node]) -> Node:
    """Where a layer's output is compared with the float model's: after the residual addition it leads to, if one follows.

    There the layer can also make up for the error that the residual stream carries. Only reshapes that keep the order of the
    tokens may stand between.
    """
    node, channels = consumer, consumer.meta["val"].shape[-1]
    while consumer.target is torch.ops.aten.linear.default and len(node.users) == 1:
        (user,) = node.users
        value = user.meta.get("val")
        if user not in inside or not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != channels:
            break
        if user.target is torch.ops.aten.add.Tensor and all(isinstance(a, Node) for a in user.args) and not user.kwargs:
            same = all(a.meta["val"].shape == value.shape for a in user.args)  # type: ignore[union-attr]
            return user if same else consumer
        if user.target is not torch.ops.aten.reshape.default:
            break
        node = user
    return consumer


def _output_rows(y: Tensor, consumer: Node) -> Tensor:
    """A Linear's or convolution's output as (tokens, out), in the order of `_as_rows`."""
    if consumer.target is torch.ops.aten.linear.default:
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


class Reference:
    """The float model, run beside the quantized one segment by segment: what each layer should give."""

    def __init__(self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self.graph_module = shared_copy(graph_module)
        self.runner = SegmentRunner(self.graph_module, batches)
        self.twin = dict(zip(graph_module.graph.nodes, self.graph_module.graph.nodes))

    def run(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[Values]:
        """For each batch, the float values of `nodes`."""
        twins = [self.twin[n] for n in nodes]
        for values in self.runner.run(self.twin[segment.first], self._stop(segment), twins):
            yield {n: values[t] for n, t in zip(nodes, twins)}

    def advance(self, segment: Segment) -> None:
        """Go past a segment."""
        stop = self._stop(segment)
        assert stop is not None
        self.runner.advance(self.twin[segment.first], stop)

    def _stop(self, segment: Segment) -> Node | None:
        return None if segment.stop is None else self.twin[segment.stop]


def _as_rows(x: Tensor, site: Site) -> Tensor | None:
    """A Linear's input as (tokens, in); a convolution's as unfolded patches. None for grouped convolutions."""
    consumer = site.consumers[0]
    if consumer.target is torch.ops.aten.linear.default:
        return x.reshape(-1, x.shape[-1])
    if consumer.target is torch.ops.aten.conv2d.default:
        defaults: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]
        _, stride, padding, dilation, groups = list(consumer.args[2:]) + defaults[len(consumer.args) - 2:]
        weight = consumer.args[1]
        if groups != 1 or not isinstance(weight, Node):
            return None
        kernel = weight.meta["val"].shape[2:]
        patches = torch.nn.functional.unfold(x, tuple(kernel), dilation=dilation, padding=padding, stride=stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return None


def cut_into_segments(graph_module: GraphModule, plan: Plan) -> list[Segment]:
    """One segment a group where the graph can be cut cheaply before it, merged where it cannot."""
    nodes = list(graph_module.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    spans = []
    for group in plan.groups:
        anchors = [group.norm, group.softmax, *(s.slot for s in group.sites)]
        start = min(order[a] for a in anchors if a is not None)
        spans.append((start, max(order[c] for c in group.consumers), group))
    spans.sort(key=lambda s: (s[0], s[1]))
    sizes = _live_sizes(nodes, order, [s[0] for s in spans])
    segments: list[tuple[int, int, list[Group]]] = []
    for index, (start, end, group) in enumerate(spans):
        nearby = sizes[max(0, index - NEIGHBOURS): index + NEIGHBOURS + 1]
        wide = sizes[index] > WIDEST_CUT * max(1.0, min(nearby))
        if segments and (start <= segments[-1][1] or wide):
            first, last, groups = segments[-1]
            segments[-1] = (first, max(last, end), [*groups, group])
        else:
            segments.append((start, end, [group]))
    result = []
    for index, (start, _, groups) in enumerate(segments):
        begin = next(n for n in nodes if n.op not in ("placeholder", "get_attr")) if index == 0 else nodes[start]
        stop = nodes[segments[index + 1][0]] if index + 1 < len(segments) else None
        ordered = sorted(groups, key=lambda g: min(order[c] for c in g.consumers))
        result.append(Segment(begin, stop, ordered))
    return result


def _live_sizes(nodes: list[Node], order: dict[Node, int], positions: list[int]) -> list[float]:
    """Elements a sample that cross each position."""
    events = [0.0] * (len(nodes) + 1)
    for node in nodes:
        if node.op == "get_attr" or not node.users:
            continue
        last = max(order[u] for u in node.users)
        size = float(_elements(node))
        events[order[node] + 1] += size
        events[last + 1 if last + 1 < len(events) else last] -= size
    total, running = [], 0.0
    for event in events:
        running += event
        total.append(running)
    return [total[p] for p in positions]


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return math.prod(d for d in value.shape if isinstance(d, int))


def _between(first: Node, stop: Node | None) -> Iterator[Node]:
    node = first
    while node is not stop and node.op != "root":
        if node.op not in ("get_attr", "placeholder", "output"):
            yield node
        node = node.next


def _used_from(node: Node, stop: Node) -> bool:
    """Whether any reader of `node` comes at or after `stop`."""
    return any(not (user < stop) for user in node.users)


def _ancestors(wanted: Sequence[Node], position: dict[Node, int], available: Values) -> set[Node]:
    needed: set[Node] = set()
    pending = [n for n in wanted if n not in available]
    while pending:
        node = pending.pop()
        if node in needed or node not in position:
            continue
        needed.add(node)
        pending.extend(p for p in node.all_input_nodes if p not in available and p.op != "get_attr")
    return needed


