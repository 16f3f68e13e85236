"""What each choice of bits would do to each activation and each weight, calibrated on the float model in one run over
the data.

The compiler calibrates a layer on what the quantized prefix produces; here every layer sees float values, so that the
errors are those of quantizing one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.frontends.capture import tensors_in
from repquant_fx.passes.base import module_path
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.passes.slots import observer, slot_of
from repquant_fx.pipeline.choose import as_matrix, choose_quantizers
from repquant_fx.pipeline.padding import Padding
from repquant_fx.pipeline.second_moments import as_rows, counted_tokens
from repquant_fx.progress import progress
from repquant_fx.quantizers.correction import Moments
from repquant_fx.quantizers.counted import picked
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import UniformQuantizer
from repquant_fx.quantizers.weight import round_weight
from repquant_fx.recipe import Recipe
from repquant_fx.recorder import Recorder


@dataclass
class Observed:
    """What one run of the float model left behind.

    Attributes:
        moments: of the input rows of each weighted site, by site name.
        power: squared sum of each output, over all data.
        rows: predictions (vectors of the last axis) of each output.
        samples: sizes of the batch dimension, summed.
        elements: values of each site, over all data.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    power: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    samples: int = 0
    elements: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundedWeight:
    """A weight with so many bits.

    Attributes:
        quantized: codes and scales of the weight times `channels`.
        channels: factors of the input channels that a reparameterized norm leaves to the weight, shape (in,), or None.
        mean: of the input rows, shape (in,), where the bias makes up for a mean error; else None.
    """

    quantized: QuantizedWeight
    channels: Tensor | None
    mean: Tensor | None

    def error(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What rounding adds to `weight` (its shape), and to the bias (out,)."""
        restored = self.quantized.dequantize()
        if self.channels is not None:
            restored = restored / self.channels
        difference = restored - weight.reshape(len(weight), -1)
        return difference.reshape(weight.shape), None if self.mean is None else -(difference @ self.mean)


@torch.no_grad()
def observe(
    graph_module: GraphModule, plan: Plan, batches: Sequence[tuple[Tensor, ...]], mask_index: int | None,
    padding: Padding | None = None,
) -> Observed:
    """Run the float model once; observers in the slots record, and the moments that GPTQ needs are summed up.

    Args:
        mask_index: which input says what tokens are real, if one does (see `valid`).
        padding: what does not count at the sites.
    """
    observed, padding = Observed(), padding or Padding()
    slots = {slot_of(graph_module, site): site for group in plan.groups for site in group.sites}
    weighted = {site for group in plan.groups if group.kind != "matmul" for site in group.sites}
    observers = {site.name: observer(graph_module, site) for site in slots.values()}
    for site in slots.values():
        observers[site.name].start(len(batches), counts=partial(padding.counts, name=site.value.name))

    def record(number: int, slot: Node, value: Tensor) -> Tensor:
        site = slots[slot]
        observed.elements[site.name] = observed.elements.get(site.name, 0) + value.numel()
        rows = as_rows(value, site) if site in weighted else None
        if rows is not None:
            which = counted_tokens(value, site, padding.counts(number, site.value.name))
            moments = observed.moments.setdefault(site.name, Moments(rows.shape[1], device=rows.device))
            moments.add(picked(rows, which))
        return value

    for number, batch in enumerate(progress(batches, total=len(batches), description="observe")):
        outputs = tensors_in(Recorder(graph_module, slots, partial(record, number)).run(*batch))
        observed.samples += len(batch[0])
        observed.power = observed.power or [0.0] * len(outputs)
        observed.rows = observed.rows or [0.0] * len(outputs)
        for index, output in enumerate(outputs):
            real = valid(output, None if mask_index is None else batch[mask_index])
            observed.power[index] += float((output.double().square() * real).sum())
            observed.rows[index] += float(real.expand(output.shape)[..., 0].sum()) if output.ndim else 1.0
    for each in observers.values():
        each.recording = False
    return observed


def valid(output: Tensor, mask: Tensor | None) -> Tensor:
    """1 where an output counts, in a shape that broadcasts to it: padded tokens do not, where the mask has the output's
    tokens.
    """
    if mask is None or output.ndim < 2 or output.shape[:2] != mask.shape:
        return torch.ones((1,) * max(1, output.ndim))
    return (mask != 0).to(torch.float32).reshape(*mask.shape, *(1,) * (output.ndim - 2))


def activation_quantizers(graph_module: GraphModule, group: Group, choices: Mapping[str, Sequence[int]],
                          recipe: Recipe) -> dict[str, dict[int, nn.Module]]:
    """Calibrated quantizers of a group's sites, by site name and bits; the graph keeps its observers.

    Args:
        choices: bits to try at each site, by name.
    """
    quantizers: dict[str, dict[int, nn.Module]] = {site.name: {} for site in group.sites}
    for bits in sorted({b for site in group.sites for b in choices[site.name]}):
        tried = {site.name: bits for site in group.sites if bits in choices[site.name]}
        chosen = choose_quantizers(graph_module, group, recipe, tried)
        for name in tried:
            quantizers[name][bits] = chosen[name]
    return quantizers


def rounded_weights(
    graph_module: GraphModule,
    group: Group,
    site: Site,
    quantizer: nn.Module,
    choices: Mapping[Node, Sequence[int]],
    moments: Moments | None,
    recipe: Recipe,
) -> dict[Node, dict[int, RoundedWeight]]:
    """The weights that read one site, by consumer and bits, rounded as the compiler would on float inputs.

    Args:
        quantizer: the site's, at the recipe's bits: its channel scales move into the weights where norms are
            reparameterized.
        choices: bits to try, by consumer.
        moments: of the site's rows; None where there are none for this kind of layer (weights are then rounded to
            nearest).
    """
    channels = None
    if (
        recipe.norm in ("reparameterize", "smooth")
        and isinstance(quantizer, UniformQuantizer)
        and quantizer.axis is not None
    ):
        channels = (quantizer.exact[0] / quantizer.exact[0].mean()).float()
    hessian = mean = None
    if moments is not None:
        mean = moments.mean.float() if recipe.correction else None
        hessian = moments.hessian if recipe.correction else 2 * moments.xx
        if channels is not None:
            hessian = hessian / torch.outer(channels, channels)
    rounded: dict[Node, dict[int, RoundedWeight]] = {consumer: {} for consumer in site.consumers}
    for bits in sorted({b for c in site.consumers for b in choices[c]}):
        for use_gptq in (True, False):  # those that share a method share one sweep
            consumers = [
                c for c in site.consumers if bits in choices[c] and (group.plans[c].gptq and recipe.gptq) is use_gptq
            ]
            if not consumers:
                continue
            flat = [as_matrix(graph_module, c) for c in consumers]
            stacked = torch.cat(flat) if channels is None else torch.cat(flat) * channels
            _, chosen = round_weight(stacked, bits, hessian, recipe, use_gptq, module_path(consumers[0]))
            start = 0
            for consumer, rows in zip(consumers, map(len, flat)):
                part = QuantizedWeight(chosen.codes[start:start + rows], chosen.scale[start:start + rows])
                rounded[consumer][bits] = RoundedWeight(part, channels, mean)
                start += rows
    return rounded
