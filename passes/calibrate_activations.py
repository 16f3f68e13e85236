"""Calibrate: replace a group's observers by quantizers.

Norm sites get per-channel bounds by dual clipping (all sites of a norm share them); Softmax operands a logarithmic scale; every
other site a per-tensor range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, attribute
from repquant_fx.passes.insert_observers import WHOLE_ELEMENTS
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.quantizers import clipping, logarithmic
from repquant_fx.quantizers.observers import LogQuantizer, Observer, UniformQuantizer
from repquant_fx.quantizers.uniform import parameters_from_range
from repquant_fx.recipe import Recipe

SMOOTHING = 0.5  # how much of the difficulty goes from activations to weights
STEPS = {"log": (2, 1, 4, 8), "log_sqrt2": (2,), "log2": (1,)}  # codes an octave


class CalibrateActivations(Pass):
    name = "dual clipping and calibration"
    needs = "observers that have recorded the group's sites"
    guarantees = "each site of the group holds a quantizer"

    def __init__(self, group: Group, recipe: Recipe, known: Mapping[str, torch.nn.Module] | None = None) -> None:
        """`known`: quantizers by site name that were chosen before; they are installed and nothing is calibrated."""
        super().__init__()
        self.group, self.recipe, self.known = group, recipe, known

    def run(self, graph_module: GraphModule) -> bool:
        if self.known is not None:
            for site in self.group.sites:
                install(graph_module, site, self.known[site.name])
            return True
        recorded = {site.name: observer(graph_module, site) for site in self.group.sites}
        norm_sites = [s for s in self.group.sites if s.role == "norm"]
        if norm_sites:
            self._calibrate_norm(graph_module, norm_sites)
        # the value operand first: the Softmax scale is chosen with it already quantized
        for site in (s for s in self.group.sites if s.role == "value"):
            bounds = self._bounds(recorded[site.name].sample(), site.bits)
            scale, zero_point = parameters_from_range(bounds.low[0], bounds.up[0], site.bits, include_zero=True)
            install(graph_module, site, UniformQuantizer(scale, zero_point, site.bits))
        for site in (s for s in self.group.sites if s.role == "softmax"):
            install(graph_module, site, self._log_quantizer(graph_module, site, recorded))
        return True

    def _calibrate_norm(self, graph_module: GraphModule, sites: list[Site]) -> None:
        bits = sites[0].bits
        sample = torch.cat([observer(graph_module, s).sample() for s in sites], dim=1)
        if self.recipe.norm == "layerwise":
            bounds = self._bounds(_thin(sample.reshape(1, -1)), bits)
            scale, zero_point = parameters_from_range(bounds.low[0], bounds.up[0], bits, include_zero=True)
        elif self.recipe.norm == "smooth":
            scale, zero_point = self._smooth(graph_module, sample, bits)
        else:
            sample = sample.double() if self.recipe.clipping == "none" else sample
            if self.recipe.clipping == "search":
                bounds = clipping.search_bounds(sample, bits)
            elif self.recipe.clipping == "adam":
                bounds = clipping.learn_bounds(sample, bits)
            else:
                bounds = clipping.minmax_bounds(sample, bits)
            low, up = bounds.low.double(), bounds.up.double()
            if self.group.padded and self._keeps_zeros(graph_module):
                scale, zero_point = _around_zero(low, up, bits)
            else:
                scale, zero_point = parameters_from_range(low, up, bits, include_zero=False)
        for site in sites:
            install(graph_module, site, UniformQuantizer(scale, zero_point, bits))

    def _keeps_zeros(self, graph_module: GraphModule) -> bool:
        """Whether a padded token comes out of a Linear as exact zeros, which a shift would turn into rounding noise.

        What normalises that output afterwards (cosine attention) would blow the noise up.
        """
        for consumer in self.group.consumers:
            bias = consumer.args[2] if len(consumer.args) > 2 else None
            if not isinstance(bias, Node) or bool((attribute(graph_module, bias) == 0).any()):
                return True
        return False

    def _smooth(self, graph_module: GraphModule, sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """SmoothQuant (arXiv 2211.10438, Eq. 4): divide channel j by `max|X_j|^a / max|W_j|^(1-a)`, then use one scale for all.

        As per-channel scales with a common zero point; the reparameterization of norms then does the rest.
        """
        weights = torch.cat([attribute(graph_module, c.args[1]).abs() for c in self.group.consumers])  # type: ignore[arg-type]
        reach, weight = sample.abs().amax(1).double(), weights.amax(0).double()
        factor = reach.clamp(min=1e-5) ** SMOOTHING / weight.clamp(min=1e-5) ** (1 - SMOOTHING)
        bounds = self._bounds(_thin((sample.double() / factor[:, None]).reshape(1, -1)), bits)
        scale, zero_point = parameters_from_range(bounds.low[0].double(), bounds.up[0].double(), bits, include_zero=True)
        return scale * factor, zero_point.expand(len(factor)).clone()

    def _bounds(self, sample: Tensor, bits: int) -> clipping.Bounds:
        if self.recipe.activations == "minmax":
            return clipping.minmax_bounds(sample, bits, include_zero=True)
        if self.recipe.activations == "percentile":
            return clipping.percentile_bounds(sample, bits, self.recipe.percentile, include_zero=True)
        return clipping.search_bounds(sample, bits, include_zero=True)

    def _log_quantizer(self, graph_module: GraphModule, site: Site, recorded: dict[str, Observer]) -> LogQuantizer:
        """The codes an octave and the scale with the smallest error, of the product's output or of the values themselves."""
        sample = recorded[site.name].sample()[0]
        largest = float(sample.max())
        if not largest > 0:
            raise PassError(f"{site.name} is zero on all calibration data")
        if self.recipe.softmax_scale == "percentile":
            ordered = sample.sort().values
            a, product = sample, None
            picks = {float(ordered[int(p * (len(ordered) - 1))]) for p in (0.999, 0.9999, 0.99999, 1.0)}
            scales = sorted(c for c in picks if c > 0)
        else:
            other = next(s for s in self.group.sites if s is not site)
            a, v = recorded[site.name].whole(), recorded[other.name].whole()
            enough = -(-a.numel() // WHOLE_ELEMENTS)  # sequences may be longer than those the observer's share was reckoned with
            a, v = a[::enough], slot_module(graph_module, other)(v[::enough])
            right = site.consumers[0].args[0] is not site.slot  # the probabilities are the right operand
            product = (lambda p: torch.matmul(v, p)) if right else (lambda p: torch.matmul(p, v))
            scales = []
        exact = a if product is None else product(a)
        log, best = torch.log(a), (math.inf, 1.0, 1)
        for steps in STEPS[self.recipe.softmax]:
            snapped = sorted({logarithmic.snap(s, site.bits, steps) for s in scales})
            for scale in snapped or logarithmic.scale_candidates(largest, site.bits, steps):
                codes = logarithmic.quantize_log(log, scale, site.bits, steps)
                values = logarithmic.level_table(scale, site.bits, steps)[codes.int()]
                error = float(((values if product is None else product(values)) - exact).square().mean())
                best = min(best, (error, scale, steps))
        return LogQuantizer(best[1], site.bits, best[2])


def _around_zero(low: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Per-channel scales with the middle code as everyone's zero point: the reparameterization then shifts nothing."""
    middle, top = float(1 << (bits - 1)), float((1 << bits) - 1)
    scale = torch.maximum(-low / middle, up / (top - middle)).clamp(min=1e-8)
    return scale, torch.full_like(scale, middle)


def slot_module(graph_module: GraphModule, site: Site) -> torch.nn.Module:
    """The module at a site's slot."""
    if site.slot is None:
        raise PassError(f"{site.name} has no observer; run `insert observers` first")
    return graph_module.get_submodule(str(site.slot.target))


def observer(graph_module: GraphModule, site: Site) -> Observer:
    """The observer at a site's slot.

    Raises:
        PassError: the site holds something else, or recorded nothing.
    """
    module = slot_module(graph_module, site)
    if not isinstance(module, Observer):
        raise PassError(f"{site.name} holds a {type(module).__name__}, not an observer")
    return module


def install(graph_module: GraphModule, site: Site, module: torch.nn.Module) -> None:
    """Put `module` in a site's slot."""
    assert site.slot is not None
    graph_module.set_submodule(str(site.slot.target), module)


def _thin(sample: Tensor, limit: int = 1 << 18) -> Tensor:
    """Every k-th value of a (1, N) sample, with its extremes."""
    if sample.shape[1] <= limit:
        return sample
    stride = -(-sample.shape[1] // limit)
    return torch.cat([sample[:, ::stride], sample.amin(1, keepdim=True), sample.amax(1, keepdim=True)], dim=1)
