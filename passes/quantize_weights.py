"""Quantize a group's weights, by GPTQ on the reparameterized weights and the quantized inputs, or to nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, attribute, module_path, replace_constant
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.quantizers.gptq import QuantizedWeight, gptq, output_error, round_to_nearest, weight_grid
from repquant_fx.recipe import Recipe


class QuantizeWeights(Pass):
    """Attributes: `weights`, filled with a QuantizedWeight a consumer; `errors`, (round-to-nearest's, chosen) output error."""

    name = "quantize weights"
    needs = "quantizers at the group's sites, and one Hessian a site of their outputs"
    guarantees = "each consumer's weight is the dequantized value of its integer codes"

    def __init__(self, group: Group, recipe: Recipe, hessians: dict[str, Tensor]) -> None:
        super().__init__()
        self.group, self.recipe, self.hessians = group, recipe, hessians
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
        hessian = self.hessians.get(site.name)
        for (bits, use_gptq), consumers in by_plan.items():
            tensors = [attribute(graph_module, c.args[1]) for c in consumers]  # type: ignore[arg-type]
            flat = torch.cat([t.reshape(t.shape[0], -1) for t in tensors]).float()
            usable = hessian if hessian is not None and hessian.shape[0] == flat.shape[1] else None
            grid = weight_grid(flat, bits, symmetric=needs_symmetric(bits), search=self.recipe.weights == "mse")
            nearest = round_to_nearest(flat, grid)
            if use_gptq and usable is not None:
                # a second grid, chosen where the inputs have their energy; keep whichever ends with the smaller output error
                weighted = weight_grid(flat, bits, symmetric=needs_symmetric(bits), search=self.recipe.weights == "mse",
                                       importance=usable.diagonal().float())
                results = [gptq(flat, usable, g, damping=self.recipe.gptq_damping, block=self.recipe.gptq_block,
                                activation_order=self.recipe.gptq_activation_order, where=module_path(consumers[0]))
                           for g in (grid, weighted)]
                costs = [output_error(flat, r.dequantize(), usable) for r in results]
                first = (costs[0] <= costs[1])[:, None]
                quantized = QuantizedWeight(torch.where(first, results[0].codes, results[1].codes),
                                            torch.where(first[:, 0], results[0].scale, results[1].scale))
            else:
                quantized = nearest
            start = 0
            for consumer, tensor in zip(consumers, tensors):
                rows = slice(start, start + tensor.shape[0])
                start += tensor.shape[0]
                part = QuantizedWeight(quantized.codes[rows].reshape(tensor.shape).contiguous(), quantized.scale[rows].contiguous())
                value = quantized.dequantize()[rows]
                if usable is not None:
                    self.errors[consumer] = (float(output_error(flat[rows], nearest.dequantize()[rows], usable).sum()),
                                             float(output_error(flat[rows], value, usable).sum()))
                self.weights[consumer] = part
                name = str(consumer.args[1].target)  # type: ignore[union-attr]
                replace_constant(graph_module, consumer, 1, value.reshape(tensor.shape), name)


def needs_symmetric(bits: int) -> bool:
    """4 bits fill INT4 and 8 bits fill INT8: no room to fold a zero point into the codes."""
    return bits in (4, 8)
