"""Quantize a group's weights, by GPTQ on the reparameterized weights and the quantized inputs, or to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx import ops  # noqa: F401 - registers the operators
from repquant_fx.distributed import World
from repquant_fx.naming import QUANTIZED, SCALE, beside
from repquant_fx.passes.base import Pass, attribute, constant_node, copy_meta, drop_constant, free_stem, module_path, replace_constant
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.quantizers.correction import Moments, fit
from repquant_fx.quantizers.gptq import QuantizedWeight, gptq, output_error, round_to_nearest, weight_grid
from repquant_fx.recipe import Recipe
from repquant_fx.statistics import rounding

DEQUANTIZE = torch.ops.repquant_fx.dequantize.default


@dataclass(frozen=True)
class ChosenWeight:
    """What a consumer's weight becomes.

    Attributes:
        weight: codes in the shape of the float weight, scales of shape (out,).
        bias: float32, shape (out,); None where the old one stays.
        errors: (round-to-nearest's, chosen) output error, where there was a Hessian.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    errors: tuple[float, float] | None


class QuantizeWeights(Pass):
    """Attributes: `chosen`, by consumer: given, or filled by the pass."""

    name = "quantize weights"
    needs = "quantizers at the group's sites, and one Hessian a site of their outputs"
    guarantees = "each consumer reads the dequantized value of its integer codes; its float weight is gone"

    def __init__(self, group: Group, recipe: Recipe, hessians: dict[str, Tensor] | None = None,
                 moments: dict[str, tuple[Moments, Moments]] | None = None, world: World | None = None,
                 chosen: dict[Node, ChosenWeight] | None = None, statistics: dict[str, Any] | None = None) -> None:
        """`statistics`: filled with `statistics.rounding` of every weight that is rounded here, by its consumer's name."""
        super().__init__()
        self.group, self.recipe, self.hessians, self.moments, self.world = group, recipe, hessians or {}, moments or {}, world or World()
        self.known, self.chosen, self.statistics = chosen is not None, chosen or {}, statistics

    def run(self, graph_module: GraphModule) -> bool:
        if not self.known:
            for site in self.group.sites:
                self._quantize_site(graph_module, site)
        for consumer, choice in self.chosen.items():
            self._install(graph_module, consumer, choice)
        return bool(self.chosen)

    def _quantize_site(self, graph_module: GraphModule, site: Site) -> None:
        """All weights that read one site share its Hessian and so one sweep for each (bits, method)."""
        moments = self.moments.get(site.name)
        corrections = dict(zip(site.consumers, fit(*moments))) if moments is not None else {}
        by_plan: dict[tuple[int, bool], list[Node]] = {}
        for consumer in site.consumers:
            plan = self.group.plans[consumer]
            by_plan.setdefault((plan.wbits, plan.gptq and self.recipe.gptq), []).append(consumer)
        for (bits, use_gptq), consumers in by_plan.items():
            flat = {c: _matrix(graph_module, c) for c in consumers}
            for consumer in consumers:
                if consumer in corrections:
                    flat[consumer] = flat[consumer] + corrections[consumer].float()
            stacked = torch.cat(list(flat.values()))
            hessian = self._hessian(site, stacked.shape[1])
            quantized, errors, lost = self._round_shared(stacked, bits, hessian, use_gptq, module_path(consumers[0]))
            start = 0
            for consumer in consumers:
                rows = slice(start, start + len(flat[consumer]))
                start = rows.stop
                weight = QuantizedWeight(quantized.codes[rows], quantized.scale[rows])
                total = None if errors is None else (float(errors[rows, 0].sum()), float(errors[rows, 1].sum()))
                self.chosen[consumer] = self._choice(graph_module, site, consumer, weight, total)
                if self.statistics is not None and lost is not None:
                    self.statistics[consumer.name] = rounding(stacked[rows], lost[rows], None if errors is None else errors[rows], hessian,
                                                              use_gptq and hessian is not None)

    def _round_shared(self, weight: Tensor, bits: int, hessian: Tensor | None, use_gptq: bool,
                      where: str) -> tuple[QuantizedWeight, Tensor | None, Tensor | None]:
        """The codes chosen, and the rows' (round-to-nearest's, chosen) errors of the output and, for statistics, of the weight itself.

        Rows are independent, so ranks share them out.
        """
        rows, found = weight[self.world.rows(len(weight))], {}
        if len(rows):
            nearest, quantized = round_weight(rows, bits, hessian, self.recipe, use_gptq, where)
            found = {"codes": quantized.codes, "scale": quantized.scale}
            if self.statistics is not None:
                found["lost"] = torch.stack([(q.dequantize() - rows).double().square().sum(dim=1) for q in (nearest, quantized)], dim=1)
            if hessian is not None:
                found["errors"] = torch.stack([output_error(rows, q.dequantize(), hessian) for q in (nearest, quantized)], dim=1)
        parts = [part for part in self.world.gather(found) if part]
        whole = {k: torch.cat([part[k] for part in parts]).to(weight.device) for k in parts[0]}
        return QuantizedWeight(whole["codes"], whole["scale"]), whole.get("errors"), whole.get("lost")

    def _choice(self, graph_module: GraphModule, site: Site, consumer: Node, quantized: QuantizedWeight,
                errors: tuple[float, float] | None) -> ChosenWeight:
        """With the bias that makes the mean output the float model's."""
        old, bias = attribute(graph_module, consumer.args[1]), None  # type: ignore[arg-type]
        if site.name in self.moments:
            first, second = self.moments[site.name]
            whole = first + second
            lost = (old.reshape(len(old), -1).double() - quantized.dequantize().double()) @ whole.mean
            shift = whole.mean_residual(site.consumers.index(consumer)) + lost
            old_bias = consumer.args[2] if len(consumer.args) > 2 else None
            bias = (shift + attribute(graph_module, old_bias).double() if isinstance(old_bias, Node) else shift).float()
        scale = _fill_dead_rows(quantized.codes, quantized.scale)
        return ChosenWeight(QuantizedWeight(quantized.codes.reshape(old.shape).contiguous(), scale.contiguous()), bias, errors)

    def _hessian(self, site: Site, inputs: int) -> Tensor | None:
        """`2 X^T X`, centred where a bias correction follows; None where there is none for this kind of layer."""
        if site.name in self.moments:
            first, second = self.moments[site.name]
            whole = first + second
            return 2 * whole.count * whole.covariance
        hessian = self.hessians.get(site.name)
        return hessian if hessian is not None and hessian.shape[0] == inputs else None

    def _install(self, graph_module: GraphModule, consumer: Node, choice: ChosenWeight) -> None:
        """Put codes in place of the weight: what is quantized takes a quarter of the memory from here on."""
        node = consumer.args[1]
        assert isinstance(node, Node)
        name = str(node.target)
        if choice.bias is not None:
            replace_constant(graph_module, consumer, 2, choice.bias, beside(name, "bias"))
        stem = free_stem(graph_module, name)
        codes = constant_node(graph_module, QUANTIZED.of(stem), choice.weight.codes, consumer)
        scales = constant_node(graph_module, SCALE.of(stem), choice.weight.scale, consumer)
        with graph_module.graph.inserting_before(consumer):
            value = graph_module.graph.call_function(DEQUANTIZE, (codes, scales, None, self.group.plans[consumer].wbits, 0))
        copy_meta(consumer, value, node.meta["val"])
        consumer.update_arg(1, value)
        drop_constant(graph_module, node)


def round_weight(weight: Tensor, bits: int, hessian: Tensor | None, recipe: Recipe, use_gptq: bool,
                 where: str) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Codes to nearest, and the codes chosen, of a weight of shape (out, in) whose input has the Hessian `2 X^T X`, shape (in, in)."""
    search = recipe.weights == "mse"
    grid = weight_grid(weight, bits, symmetric=needs_symmetric(bits), search=search)
    nearest = round_to_nearest(weight, grid)
    if not use_gptq or hessian is None:
        return nearest, nearest
    # a second grid, chosen where the inputs have their energy; keep whichever ends with the smaller output error
    weighted = weight_grid(weight, bits, symmetric=needs_symmetric(bits), search=search, importance=hessian.diagonal().float())
    results = [gptq(weight, hessian, g, damping=recipe.gptq_damping, block=recipe.gptq_block,
                    activation_order=recipe.gptq_activation_order, where=where) for g in (grid, weighted)]
    costs = [output_error(weight, r.dequantize(), hessian) for r in results]
    first = costs[0] <= costs[1]
    return nearest, QuantizedWeight(torch.where(first[:, None], results[0].codes, results[1].codes),
                                    torch.where(first, results[0].scale, results[1].scale))


def _matrix(graph_module: GraphModule, consumer: Node) -> Tensor:
    weight = attribute(graph_module, consumer.args[1])  # type: ignore[arg-type]
    return weight.reshape(weight.shape[0], -1).float()


def _fill_dead_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Scales, with those of all-zero rows (free to choose) made ordinary, so that their bias fits an int32."""
    dead = codes.reshape(len(codes), -1).eq(0).all(dim=1)
    if not bool(dead.any()) or bool(dead.all()):
        return torch.where(dead, torch.full_like(scale, 1e-4), scale)  # fine enough for the bias, which is all there is
    return torch.where(dead, scale[~dead].median(), scale)


def needs_symmetric(bits: int) -> bool:
    """4 bits fill INT4 and 8 bits fill INT8: no room to fold a zero point into the codes."""
    return bits in (4, 8)
