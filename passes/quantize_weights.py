"""Quantize a group's weights, by GPTQ on the reparameterized weights and the quantized inputs, or to nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx import ops  # noqa: F401 - registers the operators
from repquant_fx.passes.base import Pass, attribute, constant_node, copy_meta, drop_constant, module_path, replace_constant
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.quantizers.correction import Moments, fit
from repquant_fx.quantizers.gptq import QuantizedWeight, gptq, output_error, round_to_nearest, weight_grid
from repquant_fx.recipe import Recipe
from repquant_fx.statistics import Statistics, rounding

DEQUANTIZE = torch.ops.repquant_fx.dequantize.default


class QuantizeWeights(Pass):
    """Attributes: `weights`, filled with a QuantizedWeight a consumer; `errors`, (round-to-nearest's, chosen) output error."""

    name = "quantize weights"
    needs = "quantizers at the group's sites, and one Hessian a site of their outputs"
    guarantees = "each consumer reads the dequantized value of its integer codes; its float weight is gone"

    def __init__(self, group: Group, recipe: Recipe, hessians: dict[str, Tensor],
                 moments: dict[Node, tuple[Moments, Moments]] | None = None, statistics: Statistics | None = None) -> None:
        super().__init__()
        self.group, self.recipe, self.hessians, self.moments = group, recipe, hessians, moments or {}
        self.statistics = statistics
        self.weights: dict[Node, QuantizedWeight] = {}
        self.errors: dict[Node, tuple[float, float]] = {}

    def run(self, graph_module: GraphModule) -> bool:
        for site in self.group.sites:
            self._quantize_site(graph_module, site)
        return bool(self.weights)

    def _quantize_site(self, graph_module: GraphModule, site: Site) -> None:
        """All weights that read one site share its Hessian and so one sweep for each (bits, method)."""
        by_plan: dict[tuple[int, bool], list[Node]] = {}
        for consumer in site.consumers:
            plan = self.group.plans[consumer]
            by_plan.setdefault((plan.wbits, plan.gptq and self.recipe.gptq), []).append(consumer)
        for (bits, use_gptq), consumers in by_plan.items():
            flat = {c: _matrix(graph_module, c) for c in consumers}
            for consumer in consumers:
                if consumer in self.moments:
                    flat[consumer] = flat[consumer] + fit(*self.moments[consumer]).float()
            stacked = torch.cat(list(flat.values()))
            hessian = self._hessian(site, consumers, stacked.shape[1])
            nearest, quantized = self._round(stacked, bits, hessian, use_gptq, module_path(consumers[0]))
            start = 0
            for consumer in consumers:
                rows = slice(start, start + len(flat[consumer]))
                start = rows.stop
                if hessian is not None:
                    self.errors[consumer] = (_total_error(stacked, nearest, hessian, rows), _total_error(stacked, quantized, hessian, rows))
                if self.statistics is not None:
                    method = "GPTQ" if use_gptq and hessian is not None else "round to nearest"
                    parts = (QuantizedWeight(q.codes[rows], q.scale[rows]) for q in (nearest, quantized))
                    self.statistics.weights[consumer.name] = rounding(stacked[rows], *parts, hessian, method)
                self._install(graph_module, consumer, quantized, rows)

    def _hessian(self, site: Site, consumers: list[Node], inputs: int) -> Tensor | None:
        """`2 X^T X`, centred where a bias correction follows; None where there is none for this kind of layer."""
        if consumers[0] in self.moments:
            first, second = self.moments[consumers[0]]
            whole = first + second
            return 2 * whole.count * whole.covariance[0]
        hessian = self.hessians.get(site.name)
        return hessian if hessian is not None and hessian.shape[0] == inputs else None

    def _round(self, weight: Tensor, bits: int, hessian: Tensor | None, use_gptq: bool,
               where: str) -> tuple[QuantizedWeight, QuantizedWeight]:
        """Codes to nearest, and the codes chosen."""
        search = self.recipe.weights == "mse"
        grid = weight_grid(weight, bits, symmetric=needs_symmetric(bits), search=search)
        nearest = round_to_nearest(weight, grid)
        if not use_gptq or hessian is None:
            return nearest, nearest
        # a second grid, chosen where the inputs have their energy; keep whichever ends with the smaller output error
        weighted = weight_grid(weight, bits, symmetric=needs_symmetric(bits), search=search, importance=hessian.diagonal().float())
        results = [gptq(weight, hessian, g, damping=self.recipe.gptq_damping, block=self.recipe.gptq_block,
                        activation_order=self.recipe.gptq_activation_order, where=where) for g in (grid, weighted)]
        costs = [output_error(weight, r.dequantize(), hessian) for r in results]
        first = costs[0] <= costs[1]
        return nearest, QuantizedWeight(torch.where(first[:, None], results[0].codes, results[1].codes),
                                        torch.where(first, results[0].scale, results[1].scale))

    def _install(self, graph_module: GraphModule, consumer: Node, quantized: QuantizedWeight, rows: slice) -> None:
        """Replace the weight by its quantized value, and set the bias so that the mean output is the float model's."""
        node = consumer.args[1]
        assert isinstance(node, Node)
        old, name = attribute(graph_module, node), str(node.target)
        scale = _fill_dead_rows(quantized.codes[rows], quantized.scale[rows])
        weight = QuantizedWeight(quantized.codes[rows].reshape(old.shape).contiguous(), scale.contiguous())
        self.weights[consumer] = weight
        if consumer in self.moments:
            first, second = self.moments[consumer]
            x, residual = (first + second).mean
            shift = residual + (old.reshape(len(old), -1).double() - quantized.dequantize()[rows].double()) @ x
            bias = consumer.args[2] if len(consumer.args) > 2 else None
            if isinstance(bias, Node):
                shift = shift + attribute(graph_module, bias).double()
            replace_constant(graph_module, consumer, 2, shift.float(), name.removesuffix("weight") + "bias")
        # codes in place of the weight: what is quantized takes a quarter of the memory from here on
        codes = constant_node(graph_module, f"{name}_quantized", weight.codes, consumer)
        scales = constant_node(graph_module, f"{name}_scale", weight.scale, consumer)
        with graph_module.graph.inserting_before(consumer):
            value = graph_module.graph.call_function(DEQUANTIZE, (codes, scales, None, self.group.plans[consumer].wbits, 0))
        copy_meta(consumer, value, node.meta["val"])
        consumer.update_arg(1, value)
        drop_constant(graph_module, node)


def _matrix(graph_module: GraphModule, consumer: Node) -> Tensor:
    weight = attribute(graph_module, consumer.args[1])  # type: ignore[arg-type]
    return weight.reshape(weight.shape[0], -1).float()


def _fill_dead_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Scales, with those of all-zero rows (free to choose) made ordinary, so that their bias fits an int32."""
    dead = codes.reshape(len(codes), -1).eq(0).all(dim=1)
    if not bool(dead.any()) or bool(dead.all()):
        return torch.where(dead, torch.full_like(scale, 1e-4), scale)  # fine enough for the bias, which is all there is
    return torch.where(dead, scale[~dead].median(), scale)


def _total_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, rows: slice) -> float:
    return float(output_error(weight[rows], quantized.dequantize()[rows], hessian).sum())


def needs_symmetric(bits: int) -> bool:
    """4 bits fill INT4 and 8 bits fill INT8: no room to fold a zero point into the codes."""
    return bits in (4, 8)
