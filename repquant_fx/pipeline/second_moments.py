"""Second moments of the inputs of weighted layers, and of what their outputs still lack: what GPTQ and the correction
start from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from repquant_fx.passes.base import aten, attribute
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.passes.slots import slot_of
from repquant_fx.pipeline.float_model import FloatModel
from repquant_fx.pipeline.padding import Padding
from repquant_fx.pipeline.routed import Part, parts, rows_of
from repquant_fx.pipeline.runner import SegmentRunner
from repquant_fx.pipeline.segments import Segment, between
from repquant_fx.quantizers.correction import Moments
from repquant_fx.quantizers.counted import picked, which_rows
from repquant_fx.recipe import Recipe
from repquant_fx.torch_private import size_hint

Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class SecondMoments:
    """Sums over all calibration data, float64, by the key of a `Part` (the site's name, where all rows are kept).

    Attributes:
        hessians: `2 X^T X`, shape (in, in), where no correction follows: none does where only some rows are kept, as
            the float model may keep others.
        halves: moments of the input and of what each consumer's output lacks, over the even and the odd batches, where
            one does.
    """

    hessians: dict[str, Tensor] = field(default_factory=dict)
    halves: dict[str, Halves] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All sums, to be added to those over other batches."""
        return [
            *self.hessians.values(),
            *(t for halves in self.halves.values() for half in halves for t in half.tensors()),
        ]

    def hessian(self, part: Part, inputs: int) -> Tensor | None:
        """`2 X^T X` of what layers read, centred where a bias correction follows; None where there is none for this
        kind of layer, or no row is kept.
        """
        if part.key in self.halves:
            first, second = self.halves[part.key]
            return (first + second).hessian
        hessian = self.hessians.get(part.key)
        if hessian is None or hessian.shape[0] != inputs or (part.kept is not None and not hessian.any()):
            return None
        return hessian


def second_moments(runner: SegmentRunner, float_model: FloatModel | None, segment: Segment, group: Group,
                   recipe: Recipe, numbers: Sequence[int], padding: Padding) -> SecondMoments:
    """What GPTQ and the correction need of a group, summed over the runner's batches.

    Args:
        float_model: the float model, where a correction follows.
        numbers: of the runner's batches among all; their parity decides about the half.
        padding: rows that are left out.
    """
    moments = SecondMoments()
    use_gptq = recipe.gptq and any(plan.gptq for plan in group.plans.values())
    if not use_gptq and float_model is None:
        return moments
    sites = {slot_of(runner.graph_module, site): site for site in group.sites if _input_size(site)}
    inside = set(between(segment.first, segment.stop))
    compared = {c: _compared(c, inside) for c in group.consumers}
    found = {slot: parts(site) for slot, site in sites.items()}
    for slot, part in ((s, part) for s, each in found.items() for part in each):
        device = attribute(runner.graph_module, part.consumers[0].args[1]).device  # type: ignore[arg-type]
        inputs, outputs = _input_size(sites[slot]), [_weight_shape(c)[0] for c in part.consumers]
        if float_model is None or part.kept is not None:
            moments.hessians[part.key] = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        else:
            moments.halves[part.key] = (Moments(inputs, outputs, device), Moments(inputs, outputs, device))
    kept = {part.kept for each in found.values() for part in each if part.kept is not None}
    wanted = [*sites, *kept, *(compared.values() if float_model is not None else ())]
    targets = float_model.run(segment, list(compared.values())) if float_model is not None else itertools.repeat(None)
    for number, values, target in zip(numbers, runner.run(segment.first, segment.stop, wanted), targets):
        for slot, site in sites.items():
            rows = as_rows(values[slot], site)
            assert rows is not None  # it has a size
            which = counted_tokens(values[slot], site, padding.counts(number, site.value.name))
            for part in found[slot]:
                x = rows_of(rows, which, None if part.kept is None else values[part.kept])
                if target is None or part.kept is not None:
                    moments.hessians[part.key] += 2 * (x.T @ x).double()
                else:
                    lacking = (_output_rows(target[compared[c]] - values[compared[c]], c) for c in part.consumers)
                    residuals = [picked(residual, which) for residual in lacking]
                    moments.halves[part.key][number % 2].add(x, residuals)
    return moments


def _compared(consumer: Node, inside: set[Node]) -> Node:
    """Where a layer's output is compared with the float model's: after the residual addition it leads to, if one
    follows.

    There the layer can also make up for the error that the residual stream carries. Only reshapes that keep the order
    of the tokens may stand between.
    """
    node, channels = consumer, consumer.meta["val"].shape[-1]
    while consumer.target is aten.linear.default and len(node.users) == 1:
        (user,) = node.users
        value = user.meta.get("val")
        if user not in inside or not isinstance(value, Tensor) or value.ndim < 2:
            break
        if any(size_hint(size) is None for size in value.shape) or value.shape[-1] != channels:
            break  # a size that depends on values compares with nothing
        if user.target is aten.add.Tensor and all(isinstance(a, Node) for a in user.args) and not user.kwargs:
            same = all(a.meta["val"].shape == value.shape for a in user.args)  # type: ignore[union-attr]
            return user if same else consumer
        if user.target is not aten.reshape.default:
            break
        node = user
    return consumer


def _output_rows(y: Tensor, consumer: Node) -> Tensor:
    """A Linear's or convolution's output as (tokens, out), in the order of `as_rows`."""
    if consumer.target is aten.linear.default:
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


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
    whole = consumer.target is aten.conv2d.default and _geometry(consumer)[3] == 1
    return math.prod(_weight_shape(consumer)[1:]) if whole or consumer.target is aten.linear.default else 0


def counted_tokens(x: Tensor, site: Site, counts: Tensor | None) -> Tensor | None:
    """Which of a site's `as_rows` count; None for all, as for patches."""
    return which_rows(x, counts) if site.consumers[0].target is aten.linear.default else None


def as_rows(x: Tensor, site: Site) -> Tensor | None:
    """A Linear's input as (tokens, in); a convolution's as unfolded patches. None for grouped convolutions."""
    consumer = site.consumers[0]
    if consumer.target is aten.linear.default:
        return x.reshape(-1, x.shape[-1])
    if not _input_size(site):
        return None
    stride, padding, dilation, _ = _geometry(consumer)
    patches = torch.nn.functional.unfold(
        x, tuple(_weight_shape(consumer)[2:]), dilation=dilation, padding=padding, stride=stride
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
