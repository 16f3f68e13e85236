"""Which channel vectors to rotate, decided on calibration data.

A rotation spreads outlier channels; where there are none it can only hurt. So every candidate is tried on a copy of the
float graph: activations and weights of the layers that it touches are quantized there and in the original, to nearest,
on the grids that the compile chooses for weights and with searched bounds for activations, and a candidate stays where
the products come out with less noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.checkpoint import Checkpoint
from repquant_fx.passes.base import aten, attribute, is_constant, run_passes, shared_copy
from repquant_fx.passes.channel_flow import leads_to_softmax
from repquant_fx.passes.identity import NodeProbe
from repquant_fx.passes.match_sites import Group, Plan
from repquant_fx.passes.rotate_vectors import RotateVectors, Rotation, gain_allows
from repquant_fx.passes.vector_flow import VectorFlow, head_sizes
from repquant_fx.passes.vector_spaces import Space, where
from repquant_fx.pipeline.observing import check_finite
from repquant_fx.pipeline.padding import find_padding
from repquant_fx.quantizers.clipping import search_bounds
from repquant_fx.quantizers.counted import counted_rows, zero_elsewhere
from repquant_fx.quantizers.gptq import LEAVES
from repquant_fx.quantizers.groups import Grouping, nearest
from repquant_fx.quantizers.rotation import rotation
from repquant_fx.quantizers.uniform import fake_quantize, parameters_from_range
from repquant_fx.quantizers.weight import to_nearest
from repquant_fx.recipe import MANY_BITS, ROTATE, Recipe
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.recorder import Recorder

BATCHES = 2  # of the calibration data that a trial runs
ROWS = 1024  # of a layer's input that it looks at
ENOUGH = "what reads and writes it has 8 bits, which are enough without"
PRODUCTS = 4  # samples of each batch, of an attention product

Values = Mapping[Node, list[tuple[Tensor, Tensor | None]]]  # and what of them counts, of each batch


@dataclass(frozen=True)
class Candidate:
    """Spaces that are rotated together or not at all: the residual stream, or the heads of one layer.

    Attributes:
        kind: one of `recipe.ROTATE`.
        path: module path of what writes first.
        reason: why it cannot be rotated, '' where it can.
    """

    kind: str
    path: str
    spaces: tuple[Space, ...]
    reason: str = ""

    def nodes(self) -> set[Node]:
        """The layers and products whose operands a rotation changes."""
        touched = {node for space in self.spaces for node, _ in (*space.writers, *space.readers)}
        return touched | {product for space in self.spaces for product in space.products}


@dataclass(frozen=True)
class Trial:
    """A candidate and the noise over signal power of the products that it touches, before and after: geometric means,
    NaN untried.
    """

    candidate: Candidate
    before: float
    after: float

    @property
    def rotated(self) -> bool:
        """Whether it pays."""
        return self.after < self.before

    def to_dict(self) -> dict[str, Any]:
        """For the report: SQNR in dB of the products on calibration data, to nearest, without and with the rotation."""
        if self.candidate.reason or math.isnan(self.before):
            figures: dict[str, Any] = {"reason": self.candidate.reason or "no quantized product reads or writes it"}
        else:
            figures = {"sqnr_db": round(-10 * math.log10(self.before), 2),
                     "rotated_sqnr_db": round(-10 * math.log10(self.after), 2)}
        return {"kind": self.candidate.kind, "path": self.candidate.path, "rotated": self.rotated, **figures}


def find_candidates(graph_module: GraphModule, kinds: Iterable[str] = ROTATE) -> list[Candidate]:
    """Everything that could be rotated, or nearly, in graph order."""
    candidates = []
    if "residual" in kinds:
        for space in VectorFlow(graph_module).spaces:
            if space.norms and (space.readers or space.reason):
                reason = space.reason
                if not reason and not all(gain_allows(graph_module, norm) for norm in space.norms):
                    reason = "a norm before padding has channels without gain, which its bias cannot be divided by"
                candidates.append(Candidate("residual", where(space), (space,), reason))
    for size in head_sizes(graph_module) if "heads" in kinds else ():
        together: dict[object, list[Space]] = {}
        for space in VectorFlow(graph_module, size).spaces:
            if not space.reason and (space.readers or space.products):
                key = (*sorted({n.name for n, _ in space.writers}), bool(space.products))
                together.setdefault(key, []).append(space)
        candidates += [Candidate("heads", where(spaces[0]), tuple(spaces)) for spaces in together.values()]
    return candidates


def rotations(candidates: Sequence[Candidate], seed: int) -> list[Rotation]:
    """A matrix for every space of the candidates; the same seed and graph give the same."""
    spaces = [space for candidate in candidates for space in candidate.spaces]
    return [
        Rotation(space, rotation(space.size, seed * 10_007 + index, ones=space.fixes_ones))
        for index, space in enumerate(spaces)
    ]


def rotate(graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
           checkpoint: Checkpoint | None = None, seed: int = 0) -> list[Trial]:
    """Try every candidate that the recipe names on the data, and rotate the matched float graph in place where it pays.
    What has 8 bits only is left alone.

    Call before anything else is rewritten. The plan stays valid: only constants change.

    Returns:
        every candidate, in graph order, with its figures where it could be tried.
    """
    checkpoint = checkpoint or Checkpoint()
    if not recipe.rotate or not batches:
        return []
    layers = [(node, layer) for group in plan.groups for node, layer in group.plans.items()]
    few = {node for node, layer in layers if min(layer.wbits, layer.abits) < MANY_BITS}
    if not few:
        return []
    candidates = [c if few & c.nodes() else replace(c, reason=c.reason or ENOUGH)
                  for c in find_candidates(graph_module, recipe.rotate)]
    possible = [candidate for candidate in candidates if not candidate.reason]
    noise = checkpoint.load("rotations")
    if noise is None or noise.keys() != {"noise"} or noise["noise"].shape != (len(possible), 2):
        noise = checkpoint.world.broadcast(lambda: {"noise": _try(graph_module, plan, batches, recipe, possible, seed)})
        assert noise is not None
        checkpoint.save("rotations", noise)
    figures = dict(zip(map(id, possible), noise["noise"].tolist()))
    trials = [Trial(candidate, *figures.get(id(candidate), (math.nan, math.nan))) for candidate in candidates]
    chosen = [trial.candidate for trial in trials if trial.rotated]
    if chosen:
        run_passes(graph_module, [RotateVectors(rotations(chosen, seed))], NodeProbe(batches[0]))
    return trials


def _try(
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
    candidates: list[Candidate], seed: int
) -> Tensor:
    """Noise of each candidate's products, geometric means before and after, shape (candidates, 2), float64."""
    before = _noise(graph_module, plan, batches, recipe, {})
    copy = shared_copy(graph_module)
    twin = dict(zip(graph_module.graph.nodes, copy.graph.nodes))
    run_passes(copy, [RotateVectors(rotations([_twins(candidate, twin) for candidate in candidates], seed))])
    after = _noise(copy, plan, batches, recipe, twin)
    rows = [
        [_mean([noise[node] for node in candidate.nodes() if node in noise]) for noise in (before, after)]
        for candidate in candidates
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def _mean(noise: list[float]) -> float:
    return math.exp(sum(math.log(max(n, 1e-30)) for n in noise) / len(noise)) if noise else math.nan


def _twins(candidate: Candidate, twin: Mapping[Node, Node]) -> Candidate:
    spaces = tuple(
        Space(
            s.size,
            [(twin[n], b) for n, b in s.writers],
            [(twin[n], b) for n, b in s.readers],
            [twin[n] for n in s.norms],
            [twin[n] for n in s.products],
        )
        for s in candidate.spaces
    )
    return Candidate(candidate.kind, candidate.path, spaces)


def _noise(
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe,
    twin: Mapping[Node, Node]
) -> dict[Node, float]:
    """Noise over signal power of each quantized product of the plan, by consumer; `twin`: the plan's nodes in this
    graph.
    """
    groups = [g for g in plan.groups if g.kind != "conv"]
    wanted = {twin.get(s.value, s.value): s.name for g in groups for s in g.sites}
    rows: dict[Node, list[tuple[Tensor, Tensor | None]]] = {}
    some = batches[:BATCHES]  # whole: a model may take no fewer samples
    padding = find_padding(graph_module, some)

    def keep(number: int, node: Node, value: Tensor) -> Tensor:
        check_finite(value, wanted[node])
        rows.setdefault(node, []).append((value, padding.counts(number, node.name)))
        return value

    for number, batch in enumerate(some):
        with torch.no_grad():
            Recorder(graph_module, wanted, partial(keep, number)).run(*batch)
    found: dict[Node, float] = {}
    for group in groups:
        found.update(_products(graph_module, group, rows, twin, recipe) if group.kind == "matmul"
                     else _linears(graph_module, group, rows, twin, recipe))
    return found


def _some_rows(values: list[tuple[Tensor, Tensor | None]], count: int) -> Tensor:
    rows = torch.cat([counted_rows(value, counts) for value, counts in values])
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def _linears(graph_module: GraphModule, group: Group, rows: Values, twin: Mapping[Node, Node],
             recipe: Recipe) -> Iterator[tuple[Node, float]]:
    for site in group.sites:
        x = _some_rows(rows[twin.get(site.value, site.value)], ROWS)
        if site.bits == FLOAT:
            quantized = x
        elif site.role == "norm":
            bounds = search_bounds(x.T.contiguous(), site.bits)
            quantized = fake_quantize(
                x, *parameters_from_range(bounds.low, bounds.up, site.bits, include_zero=False), site.bits, axis=-1
            )
        else:
            (quantized,) = _per_tensor([x], site.bits)
        for consumer in site.consumers:
            weight_node = twin.get(consumer, consumer).args[1]
            if consumer.target is not aten.linear.default or not is_constant(weight_node):
                continue
            weight = attribute(graph_module, weight_node)  # type: ignore[arg-type]
            plan = group.plans[consumer]
            if site.bits == FLOAT:
                grouping = Grouping(plan.wbits, recipe.group_size, recipe.weights == "mse")
                lost = nearest(weight, grouping).dequantize() - weight
            else:
                lost = to_nearest(plan.wbits, recipe, weight) - weight
            noise = (quantized - x) @ weight.T
            noise += quantized @ lost.T * (LEAVES if plan.gptq and recipe.gptq else 1.0)
            yield consumer, float(noise.square().sum() / (x @ weight.T).square().sum().clamp(min=1e-30))


def _products(graph_module: GraphModule, group: Group, rows: Values, twin: Mapping[Node, Node],
              recipe: Recipe) -> Iterator[tuple[Node, float]]:
    """The operands of each batch are multiplied apart: a product of matrices without a batch axis has none to join.
    Keys are taken as equalization leaves them, without what all of them have in common.
    """
    batches = []
    product = twin.get(group.consumers[0], group.consumers[0])
    keys = "keys" in recipe.equalize and leads_to_softmax(graph_module, product)
    for operands in zip(*(rows[twin.get(site.value, site.value)] for site in group.sites), strict=True):
        left, right = (zero_elsewhere(value, counts) for value, counts in operands)
        some = PRODUCTS if min(left.ndim, right.ndim) > 2 and left.shape[0] == right.shape[0] else None
        batches.append((left[:some], _without_mean(right[:some]) if keys else right[:some]))
    sides = zip(*batches, strict=True)
    parts = [list(v) if s.role == "softmax" else _per_tensor(v, s.bits) for v, s in zip(sides, group.sites)]
    found, exact = (torch.cat([torch.matmul(*pair).flatten() for pair in pairs]) for pairs in (zip(*parts), batches))
    yield group.consumers[0], _ratio(found, exact)


def _without_mean(keys: Tensor) -> Tensor:
    """Less the mean of each channel, over the keys (the last axis) and, where heads have an axis, the batch."""
    return keys - keys.mean([-1] if keys.ndim < 4 else [0, -1], keepdim=True)


def _per_tensor(values: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Quantized with one scale for all of them."""
    flat = torch.cat([value.reshape(1, -1) for value in values], 1)
    some = flat[:, :: max(1, flat.shape[1] >> 16)].contiguous()
    bounds = search_bounds(some, bits, include_zero=True)
    grid = parameters_from_range(bounds.low[0], bounds.up[0], bits, include_zero=True)
    return [fake_quantize(value, *grid, bits) for value in values]


def _ratio(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate - exact).square().sum() / exact.square().sum().clamp(min=1e-30))
