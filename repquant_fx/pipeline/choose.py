"""Choose what becomes of a group: reads samples and weights off the graph, and leaves the mathematics to
`quantizers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.distributed import World
from repquant_fx.errors import CalibrationError
from repquant_fx.passes.base import attribute, is_constant, module_path
from repquant_fx.passes.insert_observers import WHOLE_ELEMENTS
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.passes.normalize_rows import may_normalize
from repquant_fx.passes.parameters import parameters
from repquant_fx.passes.slots import observer, slot_module
from repquant_fx.pipeline.routed import Part, parts
from repquant_fx.pipeline.second_moments import SecondMoments
from repquant_fx.quantizers.activation import (
    STEPS,
    norm_quantizer,
    softmax_quantizer,
    softmax_quantizer_by_percentile,
    tensor_quantizer,
)
from repquant_fx.quantizers.balance import Weight
from repquant_fx.quantizers.correction import fit
from repquant_fx.quantizers.gptq import QuantizedWeight, output_error
from repquant_fx.quantizers.groups import Grouping
from repquant_fx.quantizers.observers import LogQuantizer, Observer, UniformQuantizer
from repquant_fx.quantizers.weight import (
    ChosenWeight,
    corrected_bias,
    round_weight,
    to_nearest,
    with_ordinary_scales,
    with_room_for_bias,
)
from repquant_fx.recipe import MANY_BITS, Recipe
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.statistics import rounding


def choose_quantizers(
    graph_module: GraphModule, group: Group, recipe: Recipe, bits: Mapping[str, int] | None = None
) -> dict[str, nn.Module]:
    """The quantizers of a group's sites, by site name, from what the observers in its slots recorded.

    Norm sites get scales per channel (all sites of a norm share them), Softmax operands a logarithmic scale, every
    other site a scale for the whole tensor, and what stays in float none.

    Args:
        bits: by site name, where others than those matched are wanted.

    Raises:
        PassError: a slot holds no observer, or it has seen no data.
        CalibrationError: probabilities of a Softmax are no numbers.
    """
    sites = [site for site in group.sites if site.bits != FLOAT]
    bits = {site.name: site.bits for site in sites} | dict(bits or {})
    observers = {site.name: observer(graph_module, site) for site in sites}
    chosen: dict[str, nn.Module] = {}
    norm_sites = [site for site in sites if site.role == "norm"]
    if norm_sites:
        sample = torch.cat([observers[site.name].sample() for site in norm_sites], dim=1)
        assert group.norm is not None
        shared = norm_quantizer(sample, bits[norm_sites[0].name], recipe, _weights(graph_module, group, recipe),
                                keep_zero=group.padded and _keeps_zeros(graph_module, group),
                                bias=parameters(graph_module, group.norm)[1])
        chosen |= {site.name: UniformQuantizer(*shared.exact, shared.bits) for site in norm_sites}
    # the value operand first: the Softmax scale is chosen with it already quantized
    for site in (site for site in sites if site.role == "plain"):
        chosen[site.name] = tensor_quantizer(observers[site.name].sample(), bits[site.name], recipe)
    for site in (site for site in sites if site.role == "softmax"):
        other = next(s for s in group.sites if s is not site)
        chosen[site.name] = _choose_softmax(
            site,
            bits[site.name],
            recipe,
            observers[site.name],
            observers[other.name],
            chosen[other.name],
            right=group.sites.index(site) == 1,
        )
    return chosen


def _choose_softmax(site: Site, bits: int, recipe: Recipe, observed: Observer, other: Observer, quantizer: nn.Module, *,
                    right: bool) -> LogQuantizer:
    """Of the probabilities at `site`; `other` observed the other operand of the product and `quantizer` is what it
    gets.

    Args:
        right: the probabilities are the right operand.
    """
    sample = observed.sample()[0]
    largest = float(sample.max())
    if math.isnan(largest):
        raise CalibrationError(f"{site.name} is no number on calibration data; check the data and the weights")
    if not largest > 0:  # any scale will do: zero has a code of its own
        return LogQuantizer(1.0, bits, STEPS[recipe.softmax][0])
    if recipe.softmax_scale == "percentile":
        return softmax_quantizer_by_percentile(sample, bits, recipe.softmax)
    probabilities, values = observed.whole(), other.whole()
    # sequences may be longer than those the observer's share was reckoned with
    enough = -(-probabilities.numel() // WHOLE_ELEMENTS)
    probabilities, values = probabilities[::enough], quantizer(values[::enough])
    product = (lambda p: torch.matmul(values, p)) if right else (lambda p: torch.matmul(p, values))
    normalize = recipe.normalize_rows and bits < MANY_BITS and not right and may_normalize(site)
    return softmax_quantizer(probabilities, largest, bits, recipe.softmax, product, normalize=normalize)


def _weights(graph_module: GraphModule, group: Group, recipe: Recipe) -> list[Weight]:
    """Those that read a group's norm, and how they will be rounded."""
    return [
        (as_matrix(graph_module, consumer), partial(to_nearest, group.plans[consumer].wbits, recipe),
         group.plans[consumer].gptq and recipe.gptq)
        for consumer in group.consumers
    ]


def _keeps_zeros(graph_module: GraphModule, group: Group) -> bool:
    """Whether a padded token comes out of a Linear as exact zeros, which a shift would turn into rounding noise.

    What normalises that output afterwards (cosine attention) would blow the noise up.
    """
    for consumer in group.consumers:
        bias = consumer.args[2] if len(consumer.args) > 2 else None
        if not isinstance(bias, Node) or bool((attribute(graph_module, bias) == 0).any()):
            return True
    return False


def choose_weights(graph_module: GraphModule, group: Group, recipe: Recipe, moments: SecondMoments, world: World,
                   statistics: dict[str, Any] | None = None) -> dict[Node, ChosenWeight]:
    """The integer weights of a group's consumers, on the inputs that the quantizers in its slots give; the same on
    every rank.

    Args:
        statistics: filled with `statistics.rounding` of every weight, by its consumer's name, where given.
    """
    chosen: dict[Node, ChosenWeight] = {}
    for site, part in ((s, part) for s in group.sites for part in parts(s)):
        halves = moments.halves.get(part.key)
        corrections = dict(zip(part.consumers, fit(*halves))) if halves is not None else {}
        alike: dict[tuple[int, bool], list[Node]] = {}
        for consumer in part.consumers:
            plan = group.plans[consumer]
            alike.setdefault((plan.wbits, plan.gptq and recipe.gptq), []).append(consumer)
        grouped = site.bits == FLOAT and group.kind == "linear"
        for (bits, use_gptq), consumers in alike.items():
            grouping = Grouping(bits, recipe.group_size, recipe.weights == "mse") if grouped else None
            weights = [
                as_matrix(graph_module, c) + corrections[c].float() if c in corrections else as_matrix(graph_module, c)
                for c in consumers
            ]
            hessian = moments.hessian(part, weights[0].shape[1])
            how = partial(round_weight, bits=bits, hessian=hessian, recipe=recipe, use_gptq=use_gptq,
                          where=module_path(consumers[0]), grouping=grouping)
            rounded = _round(weights, how, hessian, world, lost=statistics is not None)
            for consumer, weight, tensors in zip(consumers, weights, rounded):
                chosen[consumer] = _finished(graph_module, site, part, consumer, tensors, moments,
                                             grouping.size if grouping else 0)
                if statistics is not None:
                    statistics[consumer.name] = rounding(
                        weight, tensors["lost"], tensors.get("errors"), hessian, use_gptq and hessian is not None
                    )
    return chosen


def _round(weights: list[Tensor], rounded: Callable[[Tensor], tuple[QuantizedWeight, QuantizedWeight]],
           hessian: Tensor | None, world: World, *, lost: bool) -> list[dict[str, Tensor]]:
    """For each of some weights that read one site: `codes`, `scale` and a `zero_point` where it has one, each row's
    (to nearest, as chosen) `errors` of the output, and where `lost` is set those of the weight itself.

    All share one Hessian and so one sweep. Rows are independent, so ranks share them out.
    """
    stacked, part = torch.cat(weights), dict[str, Tensor]()
    rows = stacked[world.row_shard(len(stacked))]
    if len(rows):
        nearest, quantized = rounded(rows)
        part = {"codes": quantized.codes, "scale": quantized.scale}
        if quantized.zero_point is not None:
            part["zero_point"] = quantized.zero_point
        if lost:
            part["lost"] = torch.stack(
                [(q.dequantize() - rows).double().square().sum(dim=1) for q in (nearest, quantized)], dim=1
            )
        if hessian is not None:
            part["errors"] = torch.stack(
                [output_error(rows, q.dequantize(), hessian) for q in (nearest, quantized)], dim=1
            )
    parts = [part for part in world.all_gather(part) if part]
    whole = {
        k: torch.cat([part[k] for part in parts]).to(stacked.device).split([len(w) for w in weights]) for k in parts[0]
    }
    return [{k: pieces[index] for k, pieces in whole.items()} for index in range(len(weights))]


def _finished(
    graph_module: GraphModule, site: Site, part: Part, consumer: Node, rounding: Mapping[str, Tensor],
    moments: SecondMoments, size: int = 0
) -> ChosenWeight:
    """In the shape of the consumer's weight, with the bias that makes the mean output the float model's where there are
    moments of it.

    Args:
        size: of the groups that share a scale, 0 for all.
    """
    quantized = QuantizedWeight(rounding["codes"], rounding["scale"], rounding.get("zero_point"), size)
    bias, errors = None, None
    argument = consumer.args[2] if len(consumer.args) > 2 else None
    old_bias = attribute(graph_module, argument) if is_constant(argument) else None  # type: ignore[arg-type]
    if part.key in moments.halves:
        first, second = moments.halves[part.key]
        bias = corrected_bias(
            as_matrix(graph_module, consumer),
            old_bias,
            quantized,
            first + second,
            part.consumers.index(consumer),
        )
    if "errors" in rounding:
        errors = (float(rounding["errors"][:, 0].sum()), float(rounding["errors"][:, 1].sum()))
    if site.bits != FLOAT:
        quantized = with_ordinary_scales(quantized)
    kept, quantizer = old_bias if bias is None else bias, slot_module(graph_module, site)
    if kept is not None and isinstance(quantizer, UniformQuantizer) and quantizer.axis is None:
        quantized = with_room_for_bias(quantized, kept, float(quantizer.scale))
    shape = attribute(graph_module, consumer.args[1]).shape  # type: ignore[arg-type]
    codes, scale = quantized.codes.reshape(shape).contiguous(), quantized.scale.contiguous()
    return ChosenWeight(replace(quantized, codes=codes, scale=scale), bias, errors)


def as_matrix(graph_module: GraphModule, consumer: Node) -> Tensor:
    """A consumer's weight, float32, shape (out, in)."""
    weight = attribute(graph_module, consumer.args[1])  # type: ignore[arg-type]
    return weight.reshape(len(weight), -1).float()
