"""The sequential pipeline (RepQuant Algorithm 1): groups in graph order, each calibrated on what the quantized prefix produces.

The graph is cut where few values are live. Only the cut values of all calibration batches are kept; one segment runs at a time
and the prefix never runs again, so cost grows linearly with depth and memory is bounded by one segment and its cut values.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx import decisions, log
from repquant_fx.checkpoint import Ledger
from repquant_fx.distributed import Tensors, World
from repquant_fx.errors import CalibrationError, RepQuantWarning
from repquant_fx.offload import Values, cuts_of
from repquant_fx.passes.absorb_scales import Absorbable, AbsorbScales, channel_rows, find_absorbable
from repquant_fx.passes.base import attribute, run_passes, shared_copy
from repquant_fx.passes.calibrate_activations import CalibrateActivations, slot_module
from repquant_fx.passes.insert_observers import CHANNEL_SAMPLE
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.passes.quantize_weights import ChosenWeight, QuantizeWeights
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.passes.reparameterize_softmax import ReparameterizeSoftmax
from repquant_fx.progress import progress
from repquant_fx.quantizers.clipping import Bounds, search_bounds
from repquant_fx.quantizers.correction import Moments
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import Observer
from repquant_fx.recipe import Recipe
from repquant_fx.statistics import Statistics

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


def absorb_scales(graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
                  ledger: Ledger | None = None) -> bool:
    """Level channels between layers (see `passes.absorb_scales`), by one run of the float model over the calibration data.

    Call before observers are inserted. Returns whether anything was rewritten.
    """
    ledger = ledger or Ledger()
    if not recipe.absorb or not batches:
        return False
    absorbable = find_absorbable(graph_module, plan, recipe.absorb)
    sites = {site.name: site for group in plan.groups for site in group.sites if site.name in absorbable.sites}
    if not sites:
        return False
    found = ledger.load("absorb")
    if found is None or found.keys() != {f"{end}.{name}" for end in ("low", "up", "error") for name in sites}:
        found = _channel_bounds(graph_module, sites, absorbable, batches, ledger.world)
        ledger.save("absorb", found)
    bounds = {name: Bounds(*(found[f"{end}.{name}"] for end in ("low", "up", "error"))) for name in sites}
    run_passes(graph_module, [AbsorbScales(plan, absorbable, bounds)])
    return True


def _channel_bounds(graph_module: GraphModule, sites: dict[str, Site], absorbable: Absorbable, batches: Sequence[tuple[Tensor, ...]],
                    world: World) -> Tensors:
    """Clipping bounds of every channel of the sites in the float model."""
    observers = {name: Observer(True, CHANNEL_SAMPLE) for name in sites}
    wanted: dict[Node, list[str]] = {}
    mine = world.share(len(batches))
    for name, site in sites.items():
        observers[name].start(len(batches), mine)
        wanted.setdefault(site.value, []).append(name)

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            for name in wanted.get(n, ()):
                observers[name](channel_rows(value, absorbable.sites[name]))
            return value

    recorder = Record(graph_module)
    with torch.no_grad():
        for number in progress(mine, total=len(mine), description="absorb"):
            recorder.run(*batches[number])
    merge_observers(list(observers.values()), world)

    def search() -> Tensors:
        bounds = {name: search_bounds(observers[name].sample(), site.bits) for name, site in sites.items()}
        for name, bound in bounds.items():
            if not bool(torch.isfinite(bound.low).all() and torch.isfinite(bound.up).all()):
                raise CalibrationError(f"the activation at {name} is not finite on the calibration data; check the data and the model's weights")
        return {f"{end}.{name}": getattr(bound, end) for name, bound in bounds.items() for end in ("low", "up", "error")}

    found = world.from_first(search)
    assert found is not None
    return found


def merge_observers(observers: Sequence[Observer], world: World) -> None:
    """Let every rank's observers hold what all ranks' recorded."""
    if world.size > 1:
        for each in observers:
            mine = each.recorded()
            device = next(iter(mine.values())).device if mine else torch.device("cpu")
            each.merge([on(part, device) for part in world.gather(mine)])


class SegmentRunner:
    """Runs node ranges of a graph on stored values, a batch at a time.

    Attributes:
        cuts: the values live at the node reached, a batch each; in a file where an offload directory is given.
    """

    def __init__(self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]], offload_dir: str | Path | None = None) -> None:
        self.graph_module = graph_module
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.cuts = cuts_of([dict(zip(placeholders, batch)) for batch in batches], offload_dir)
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
        position = {node: i for i, node in enumerate(before)}
        live = {n for n in [*before, *(self.cuts[0] if self.cuts else {})] if n.op != "get_attr" and _used_from(n, stop)}

        def following(cut: Values) -> Values:
            needed = _ancestors([n for n in live if n in position], position, cut)
            computed = self._execute([n for n in before if n in needed], dict(cut), live)
            return {n: v for n, v in computed.items() if n in live}

        self.cuts.replace(following)

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
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe, ledger: Ledger | None = None,
    offload_dir: str | Path | None = None, statistics: Statistics | None = None,
) -> Quantized:
    """Calibrate, reparameterize and quantize every group in graph order, editing the graph in place.

    Args:
        graph_module: with observers inserted.
        batches: positional inputs of the model, one tuple a batch; all of them, on every rank.
        ledger: where decisions are kept and read again, and which processes work together.
        offload_dir: a folder for the values between segments; in memory where None.
        statistics: filled with what the HTML report draws, where given.

    Raises:
        CalibrationError: no data, or an activation that is not finite (named).
    """
    if not batches:
        raise CalibrationError("no calibration data")
    state = _State(graph_module, cut_into_segments(graph_module, plan), batches, recipe, ledger or Ledger(), offload_dir, statistics)
    for number, (segment, group) in enumerate(progress(state.order, total=len(plan.groups), description="quantize")):
        _quantize_group(state, segment, group, f"group-{number:04d}")
    return state.finish()


class _State:
    """What passes from group to group: the runners, how far they are, and the result so far."""

    def __init__(self, graph_module: GraphModule, segments: list[Segment], batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
                 ledger: Ledger, offload_dir: str | Path | None, statistics: Statistics | None) -> None:
        self.graph_module, self.recipe, self.ledger, self.statistics = graph_module, recipe, ledger, statistics
        self.order = [(segment, group) for segment in segments for group in segment.groups]
        self.batches, self.mine = len(batches), ledger.world.share(len(batches))
        self.device = batches[0][0].device
        share = [batches[i] for i in self.mine]
        self.reference = Reference(graph_module, share, offload_dir) if recipe.correction else None
        self.runner = SegmentRunner(graph_module, share, offload_dir)
        self.reached = segments[0].first if segments else None
        self.result = Quantized(segments=len(segments))
        self.unseen = 0  # groups decided before, when no statistics were asked for

    def reach(self, segment: Segment) -> None:
        """Advance to a segment, through all that were finished since (or before this process began)."""
        if self.reached is not None and self.reached is not segment.first:
            with log.part("advance"):
                self.runner.advance(self.reached, segment.first)
                if self.reference is not None:
                    self.reference.advance(self.reached, segment.first)
        self.reached = segment.first

    def finish(self) -> Quantized:
        """The result, with what it took."""
        if self.unseen:
            warnings.warn(f"{self.unseen} of {len(self.order)} groups of layers were finished before without statistics: the page has no figures of "
                          "them; take a new work directory for all", RepQuantWarning, stacklevel=2)
        self.result.node_executions = self.runner.node_executions + (self.reference.runner.node_executions if self.reference is not None else 0)
        return self.result


def _quantize_group(state: _State, segment: Segment, group: Group, name: str) -> None:
    """Decide about a group, or take what was decided before, and rewrite the graph accordingly."""
    graph_module, recipe, ledger = state.graph_module, state.recipe, state.ledger
    kept = on(ledger.load(name), state.device)
    quantizers, chosen = _recorded(group, kept)
    fresh = quantizers is None
    part = None if state.statistics is None else Statistics() if kept is None or fresh else Statistics.from_tensors(kept)
    if quantizers is None:
        state.reach(segment)
        quantizers = _calibrate(state, segment, group, part)
    tensors = decisions.quantizers_to_tensors(group, quantizers)
    passes: list[Any] = [CalibrateActivations(group, recipe, quantizers)]
    if recipe.norm in ("reparameterize", "smooth"):
        passes.append(ReparameterizeNorms(group))
    passes.append(ReparameterizeSoftmax(group))
    run_passes(graph_module, passes)
    if group.kind != "matmul":
        with log.part("second moments"):
            moments = _second_moments(state, segment, group) if fresh else ({}, {})
        pass_ = QuantizeWeights(group, recipe, *moments, ledger.world, chosen, None if part is None else part.weights)
        with log.part("quantize weights"):
            run_passes(graph_module, [pass_])
        state.result.weights.update({c: choice.weight for c, choice in pass_.chosen.items()})
        state.result.errors.update({c: choice.errors for c, choice in pass_.chosen.items() if choice.errors is not None})
        tensors |= decisions.weights_to_tensors(group, pass_.chosen)
    if state.statistics is not None and part is not None:
        state.statistics.add(part)
        tensors |= part.to_tensors()
    elif state.statistics is not None:
        state.unseen += 1
    if fresh:
        ledger.save(name, tensors)


def on(tensors: Tensors | None, device: torch.device) -> Any:
    """What was read from a file or came from another process, where this one computes."""
    return None if tensors is None else {name: tensor.to(device) for name, tensor in tensors.items()}


def _recorded(group: Group, tensors: Tensors | None) -> tuple[dict[str, torch.nn.Module] | None, dict[Node, ChosenWeight] | None]:
    """The decisions that were kept about a group; None where there are none that fit it."""
    if tensors is None:
        return None, None
    try:
        quantizers, chosen = decisions.quantizers_from_tensors(group, tensors), decisions.weights_from_tensors(group, tensors)
    except (KeyError, ValueError) as error:
        warnings.warn(f"what the work directory holds about {group.path} does not fit ({error}) and is made anew",
                      RepQuantWarning, stacklevel=2)
        return None, None
    return quantizers, chosen


def _calibrate(state: _State, segment: Segment, group: Group, statistics: Statistics | None) -> dict[str, torch.nn.Module]:
    """Observe a group's sites on all batches and choose their quantizers, by site name."""
    slots = [site.slot for site in group.sites if site.slot is not None]
    modules = {site.name: slot_module(state.graph_module, site) for site in group.sites}
    observers = {name: module for name, module in modules.items() if isinstance(module, Observer)}
    for each in observers.values():
        each.start(state.batches, state.mine)
    with log.part("observe"):
        for values in state.runner.run(segment.first, segment.stop, slots):
            for site in group.sites:
                if site.slot is not None and not bool(torch.isfinite(values[site.slot]).all()):
                    raise CalibrationError(f"the activation at {site.name} is not finite on the calibration data; "
                                           "check the data and the model's weights")
        merge_observers(list(observers.values()), state.ledger.world)

    def choose() -> Tensors:
        run_passes(state.graph_module, [CalibrateActivations(group, state.recipe)])
        return decisions.quantizers_to_tensors(group, {site.name: slot_module(state.graph_module, site) for site in group.sites})

    with log.part("choose scales"):
        found = state.ledger.world.from_first(choose)
    assert found is not None
    quantizers = decisions.quantizers_from_tensors(group, on(found, state.device))
    if statistics is not None:
        statistics.observe(group.sites, observers, quantizers, reparameterized=state.recipe.norm in ("reparameterize", "smooth"))
    return quantizers


def _second_moments(state: _State, segment: Segment, group: Group) -> tuple[dict[str, Tensor], dict[str, Halves]]:
    """What GPTQ and the correction need: `2 X^T X` a site, or the moments of its input and of its consumers' missing outputs."""
    runner, reference, recipe = state.runner, state.reference, state.recipe
    hessians: dict[str, Tensor] = {}
    moments: dict[str, Halves] = {}
    use_gptq = recipe.gptq and any(plan.gptq for plan in group.plans.values())
    if not use_gptq and reference is None:
        return hessians, moments
    sites = {site.slot: site for site in group.sites if site.slot is not None and _input_size(site)}
    inside = set(_between(segment.first, segment.stop))
    compared = {c: _compared(c, inside) for c in group.consumers}
    for site in sites.values():
        device = attribute(state.graph_module, site.consumers[0].args[1]).device  # type: ignore[arg-type]
        inputs, outputs = _input_size(site), [_weight_shape(c)[0] for c in site.consumers]
        if reference is None:
            hessians[site.name] = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        else:
            moments[site.name] = (Moments(inputs, outputs, device), Moments(inputs, outputs, device))
    wanted = [*sites, *compared.values()] if reference is not None else list(sites)
    targets = reference.run(segment, list(compared.values())) if reference is not None else itertools.repeat(None)
    for number, values, target in zip(state.mine, runner.run(segment.first, segment.stop, wanted), targets):
        for slot, site in sites.items():
            x = as_rows(values[slot], site)
            assert x is not None  # it has a size
            if target is None:
                hessians[site.name] += 2 * (x.T @ x).double()
            else:
                residuals = [_output_rows(target[compared[c]] - values[compared[c]], c) for c in site.consumers]
                moments[site.name][number % 2].add(x, residuals)
    state.ledger.world.add_up([*hessians.values(), *(t for halves in moments.values() for half in halves for t in half.tensors())])
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
    """A Linear's or convolution's output as (tokens, out), in the order of `as_rows`."""
    if consumer.target is torch.ops.aten.linear.default:
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


class Reference:
    """The float model, run beside the quantized one segment by segment: what each layer should give."""

    def __init__(self, graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]], offload_dir: str | Path | None = None) -> None:
        self.graph_module = shared_copy(graph_module)
        self.runner = SegmentRunner(self.graph_module, batches, offload_dir)
        self.twin = dict(zip(graph_module.graph.nodes, self.graph_module.graph.nodes))

    def run(self, segment: Segment, nodes: Sequence[Node]) -> Iterator[Values]:
        """For each batch, the float values of `nodes`."""
        twins = [self.twin[n] for n in nodes]
        stop = None if segment.stop is None else self.twin[segment.stop]
        for values in self.runner.run(self.twin[segment.first], stop, twins):
            yield {n: values[t] for n, t in zip(nodes, twins)}

    def advance(self, first: Node, stop: Node) -> None:
        """Go from one node of the quantized graph to another."""
        self.runner.advance(self.twin[first], self.twin[stop])


def _weight_shape(consumer: Node) -> torch.Size:
    weight = consumer.args[1]
    assert isinstance(weight, Node)
    return weight.meta["val"].shape


def _geometry(consumer: Node) -> list[Any]:
    """Stride, padding, dilation and groups of a convolution."""
    defaults: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]
    return (list(consumer.args[2:]) + defaults[len(consumer.args) - 2:])[1:]


def _input_size(site: Site) -> int:
    """Columns of what `as_rows` gives; 0 for a grouped convolution, and what else has no such form."""
    consumer = site.consumers[0]
    whole = consumer.target is torch.ops.aten.conv2d.default and _geometry(consumer)[3] == 1
    return math.prod(_weight_shape(consumer)[1:]) if whole or consumer.target is torch.ops.aten.linear.default else 0


def as_rows(x: Tensor, site: Site) -> Tensor | None:
    """A Linear's input as (tokens, in); a convolution's as unfolded patches. None for grouped convolutions."""
    consumer = site.consumers[0]
    if consumer.target is torch.ops.aten.linear.default:
        return x.reshape(-1, x.shape[-1])
    if not _input_size(site):
        return None
    stride, padding, dilation, _ = _geometry(consumer)
    patches = torch.nn.functional.unfold(x, tuple(_weight_shape(consumer)[2:]), dilation=dilation, padding=padding, stride=stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


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


