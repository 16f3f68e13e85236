"""Block reconstruction: what rounding broke is learned back, one block at a time, from the float model alone.

Blocks go in graph order, each on what the quantized and reconstructed prefix gives it. Weights before rounding, biases,
gains, scales and zero points follow the gradient, which passes straight through rounding, towards two targets at once:
the block's own float output, and the last feature that everything behind it shares, after the block's output ran
through the float rest of the model. Each squared error is divided by its value at the start; the block's own counts
twice (the loss of GLF-Q). The best look at held-back batches is kept: the start itself where none is better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.optim.lr_scheduler import LambdaLR

from repquant_fx.checkpoint import Checkpoint
from repquant_fx.distributed import Tensors, World
from repquant_fx.errors import RepQuantWarning
from repquant_fx.offload import Values
from repquant_fx.passes.base import module_path, run_passes
from repquant_fx.passes.match_sites import Plan
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.pipeline.blocks import Block, find_blocks, last_group
from repquant_fx.pipeline.learned_block import LearnedBlock, run_nodes
from repquant_fx.pipeline.observing import moved
from repquant_fx.pipeline.padding import Padding
from repquant_fx.pipeline.runner import SegmentRunner, ancestors
from repquant_fx.pipeline.segments import between, first_computed
from repquant_fx.pipeline.sequential import Quantized
from repquant_fx.progress import progress
from repquant_fx.quantizers.counted import counted_values

LOCAL = 2.0  # weight of the block's own error beside the shared feature's
HELD_BACK = 8  # one batch in so many is looked at and not learned from
LOOKS = 10

Batch = tuple[Tensor, ...]
Losses = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reconstructed:
    """What became of a block, as mean squared errors on held-back batches.

    Attributes:
        first, last: module paths where the block begins and ends.
        own: error of the block's output before and after.
        feature: error of the last shared feature before and after.
        kept_step: the step that was kept, 0 for the start.
    """

    first: str
    last: str
    own: tuple[float, float]
    feature: tuple[float, float]
    kept_step: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data for the report."""
        return asdict(self)


def reconstruct(
    graph_module: GraphModule, float_graph: GraphModule, plan: Plan, quantized: Quantized,
    batches: Sequence[Batch], steps: int, seed: int, checkpoint: Checkpoint | None = None,
    offload_dir: str | Path | None = None, padding: Padding | None = None,
) -> list[Reconstructed]:
    """Learn every block in `steps` steps, a calibration batch each, editing the graph in place.

    Args:
        graph_module: with a quantizer at every site and integer codes in place of weights.
        float_graph: that it came from; nodes have the same names.
        batches: as `quantize_sequentially` got them.
        checkpoint: where learned blocks are kept and read again, and which processes work together: each learns from
            its share of the batches, and gradients are averaged.
        offload_dir: a folder for the values between blocks; in memory where None.
        padding: what of the batches does not count.
    """
    checkpoint = checkpoint or Checkpoint()
    twins = {node.name: node for node in float_graph.graph.nodes}
    blocks = find_blocks(graph_module, plan, set(twins))
    if not steps or not blocks:
        return []
    world, results = checkpoint.world, []
    numbers = world.shard(len(batches))
    held = {i for i in range(len(batches)) if (len(batches) - 1 - i) % HELD_BACK == 0}
    with torch.inference_mode(False), torch.enable_grad():
        sides = _Sides(graph_module, float_graph, plan, {i: batches[i] for i in numbers}, offload_dir,
                       padding or Padding())
        latents = {cast(Node, consumer.args[1]): weight for consumer, weight in quantized.latents.items()}
        for index, block in enumerate(progress(blocks, total=len(blocks), description="reconstruct")):
            sides.advance(block)
            learned = LearnedBlock(graph_module, list(between(block.first, block.stop)), latents)
            looked = [n for n, i in enumerate(numbers) if i in held]
            learning = [n for n, i in enumerate(numbers) if i not in held or len(batches) == 1]
            task = _Task(learned, sides.losses(block, learned), learning, looked, steps, seed + index, world)
            before, after, kept = _resumed(task, checkpoint, f"block-{index:04d}")
            run_passes(graph_module, [learned.install()])
            results.append(Reconstructed(*_ends(block), (before[0], after[0]), (before[1], after[1]), kept))
    return results


class _Sides:
    """The quantized graph before a block and the float graph behind it, with the values of all batches at both cuts."""

    def __init__(self, graph_module: GraphModule, float_graph: GraphModule, plan: Plan, shard: Mapping[int, Batch],
                 offload_dir: str | Path | None, padding: Padding) -> None:
        self.graph_module, self.float_graph, self.padding = graph_module, float_graph, padding
        self.numbers, batches = list(shard), list(shard.values())
        self.twins = {node.name: node for node in float_graph.graph.nodes}
        self.runner = SegmentRunner(graph_module, batches, offload_dir)
        self.floats = SegmentRunner(float_graph, batches, offload_dir)
        self.reached, self.floats_reached = first_computed(graph_module), first_computed(float_graph)
        self.targets = _shared_features(float_graph, [self.twins[c.name] for c in last_group(plan).consumers])
        self.wanted = [[values[n] for n in self.targets] for values in self._float_values(self.targets)]

    def advance(self, block: Block) -> None:
        """Bring both to a block: the quantized values to its first node, the float ones to the first behind it."""
        if block.first is not self.reached:
            self.runner.advance(self.reached, block.first)
            self.reached = block.first
        if block.stop is not None:
            stop = self.twins[block.stop.name]
            self.floats.advance(self.floats_reached, stop)
            self.floats_reached = stop

    def losses(self, block: Block, learned: LearnedBlock) -> Losses:
        """The block's own error and that of the shared feature, by the batch's place in the shard."""
        if block.stop is None or block.leaves is None:
            outputs, expected = _outputs(self.graph_module), _outputs(self.float_graph)
            exact = [[values[n] for n in expected] for values in self._float_values(expected)]

            def at_the_end(index: int) -> tuple[Tensor, Tensor]:
                error = self._error(index, expected, learned(self.runner.cuts[index], outputs), exact[index])
                return error, error

            return at_the_end
        leaves, twin = block.leaves, self.twins[block.leaves.name]
        behind = list(between(self.floats_reached, None))
        needed = ancestors(self.targets, set(behind), {})
        rest = [node for node in behind if node in needed]

        def inside(index: int) -> tuple[Tensor, Tensor]:
            cut = self.floats.cuts[index]
            (value,) = learned(self.runner.cuts[index], [leaves])
            env = run_nodes(self.float_graph, rest, {**cut, twin: value})
            feature = self._error(index, self.targets, [env[n] for n in self.targets], self.wanted[index])
            return self._error(index, [twin], [value], [cut[twin]]), feature

        return inside

    def _error(self, index: int, nodes: Sequence[Node], values: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
        """Mean squared error of what counts of the values of `nodes` (of the float graph)."""
        counts = [self.padding.counts(self.numbers[index], node.name) for node in nodes]
        return torch.stack([_mean_square(v, e, c) for v, e, c in zip(values, exact, counts)]).mean()

    def _float_values(self, nodes: Sequence[Node]) -> Iterator[Values]:
        return self.floats.run(self.floats_reached, None, nodes)


@dataclass(frozen=True)
class _Task:
    """One block to learn.

    Attributes:
        losses: of the batch at a place in this rank's shard.
        learning, looked: places of the batches that are learned from, and looked at.
    """

    block: LearnedBlock
    losses: Losses
    learning: Sequence[int]
    looked: Sequence[int]
    steps: int
    seed: int
    world: World

    @torch.no_grad()
    def look(self) -> tuple[float, float]:
        """Both errors on the held-back batches of all ranks."""
        sums = torch.zeros(3, dtype=torch.float64)
        for place in self.looked:
            sums += torch.tensor([*map(float, self.losses(place)), 1.0], dtype=torch.float64)
        self.world.all_reduce([sums])
        own, feature, count = sums.tolist()
        return own / count, feature / count


def _resumed(task: _Task, checkpoint: Checkpoint, name: str) -> tuple[tuple[float, float], tuple[float, float], int]:
    """`_learn`, or what it gave before."""
    stored = checkpoint.load(name)
    if stored is not None:
        stored = moved(stored, next(task.block.parameters()).device)
        figures = stored.pop("figures").tolist()
        if {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in task.block.state_dict().items()}:
            task.block.load_state_dict(stored)
            return (figures[0], figures[1]), (figures[2], figures[3]), int(figures[4])
        warnings.warn(f"what the work directory holds as {name} does not fit and is made anew", RepQuantWarning,
                      stacklevel=2)
    before, after, kept = _learn(task)
    errors = torch.tensor([*before, *after, kept], dtype=torch.float64)
    checkpoint.save(name, {**task.block.state_dict(), "figures": errors})
    return before, after, kept


def _learn(task: _Task) -> tuple[tuple[float, float], tuple[float, float], int]:
    """Learn a block; gives both errors at the start and at the step kept, and that step."""
    block, before = task.block, task.look()
    units = tuple(max(error, 1e-30) for error in before)

    def score(errors: Sequence[Any]) -> Any:
        return errors[1] / units[1] + LOCAL * errors[0] / units[0]

    best, kept, after = state_of(block), 0, before
    parameters = list(block.parameters())
    optimizer = torch.optim.Adam(block.parameter_groups(task.steps))
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / task.steps)))
    order = _order(task.learning, task.seed)
    for step in range(1, task.steps + 1):
        optimizer.zero_grad()
        if task.learning:
            score(task.losses(next(order))).backward()
        _average(parameters, bool(task.learning), task.world)
        optimizer.step()
        schedule.step()
        if step % max(1, task.steps // LOOKS) == 0 or step == task.steps:
            now = task.look()
            if score(now) < score(after):  # a NaN is never below
                best, kept, after = state_of(block), step, now
    block.load_state_dict(best)
    return before, after, kept


def state_of(block: LearnedBlock) -> Tensors:
    """A copy of what was learned so far."""
    return {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}


def _order(places: Sequence[int], seed: int) -> Iterator[int]:
    """All places in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while places:
        yield from (places[i] for i in torch.randperm(len(places), generator=generator).tolist())


def _average(parameters: Sequence[Tensor], took_part: bool, world: World) -> None:
    """Make every rank's gradient the mean over the ranks that have data."""
    if world.size == 1:
        return
    count = torch.tensor(float(took_part))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    world.all_reduce([count, *gradients])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient / count.to(gradient.device)


def _shared_features(float_graph: GraphModule, last: Sequence[Node]) -> list[Node]:
    """What the last layers read, where all outputs come from them alone; else the outputs."""
    pending, seen = list(float_graph.graph.output_node().all_input_nodes), set(last)
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return _outputs(float_graph)
        if node not in seen and node.target is not torch.ops.aten.sym_size.int:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return list(dict.fromkeys(layer.args[0] for layer in last if isinstance(layer.args[0], Node)))


def _outputs(graph_module: GraphModule) -> list[Node]:
    """The outputs that are floating-point tensors, in order."""
    return [n for n in graph_module.graph.output_node().all_input_nodes
            if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()]


def _mean_square(value: Tensor, target: Tensor, counts: Tensor | None) -> Tensor:
    """Mean squared error of what counts; a masked score of minus infinity in both is none."""
    lacks = (torch.where(target.isfinite(), value, 0) - torch.where(target.isfinite(), target, 0)).square()
    if counts is None:
        return lacks.mean()
    counted = counted_values(lacks, counts)
    return counted.sum() / max(1, len(counted))


def _ends(block: Block) -> tuple[str, str]:
    """Module paths of a block's first and last layer."""
    paths = [module_path(node) for node in between(block.first, block.stop) if node.target is DEQUANTIZE]
    return (paths[0], paths[-1]) if paths else ("", "")
