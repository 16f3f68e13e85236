"""Insert an observer at every matched site."""

from __future__ import annotations

import math

from torch import nn
from torch.fx import GraphModule

from repquant_fx.naming import Names, attribute_name, unique
from repquant_fx.passes.base import Pass, copy_meta, module_path
from repquant_fx.passes.channel_flow import hinted
from repquant_fx.passes.match_sites import Group, Plan, Site
from repquant_fx.passes.slots import mark
from repquant_fx.passes.spec import CANONICAL, OBSERVED
from repquant_fx.quantizers.observers import Observer, Passthrough
from repquant_fx.recipe_settings import FLOAT

CHANNEL_SAMPLE = 4096  # tokens kept per norm group
TENSOR_SAMPLE = 1 << 17  # values kept per per-tensor site
WHOLE_ELEMENTS = 1 << 19  # attention probabilities kept per site, to calibrate their scale by the product's output
# the submodule that holds observers, then quantizers; numbered where the model calls a module so, even an empty one
SLOTS = "quantizers"


class InsertObservers(Pass):
    """Puts an `Observer` between each site's value and its consumers, and nothing that records where it stays in float;
    it returns the value (float32, any shape) as it is.

    Args:
        plan: of `MatchSites`.
        batches: how many will be run; samples are drawn from all of them.
    """

    name = "insert observers"
    needs = "a plan from `match sites`"
    guarantees = "each site's consumers read the site's slot; the outputs are unchanged"
    takes, gives = CANONICAL, OBSERVED

    def __init__(self, plan: Plan, batches: int) -> None:
        super().__init__()
        self.plan, self.batches = plan, max(1, batches)

    def run(self, graph_module: GraphModule) -> bool:
        if not self.plan.groups:
            return False
        called = {module_path(node).partition(".")[0] for node in graph_module.graph.nodes}
        slots, names = unique(SLOTS, lambda name: hasattr(graph_module, name) or name in called), Names()
        order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        for group in self.plan.groups:
            for site in group.sites:
                target = f"{slots}.{names.unique(attribute_name(site.name))}"
                graph_module.add_submodule(target, self._observer(group, site))
                first = min(site.consumers, key=order.__getitem__)
                with graph_module.graph.inserting_before(first):
                    slot = graph_module.graph.call_module(target, (site.value,))
                mark(copy_meta(first, slot, site.value.meta["val"]), site)
                for consumer in site.consumers:
                    consumer.update_arg(consumer.args.index(site.value), slot)
        return True

    def _observer(self, group: Group, site: Site) -> nn.Module:
        if site.bits == FLOAT:
            return Passthrough()
        if site.role == "norm":
            return Observer(True, CHANNEL_SAMPLE)
        if any(s.role == "softmax" for s in group.sites):
            probabilities = next(s for s in group.sites if s.role == "softmax")
            per_slice = max(1, math.prod(hinted(probabilities.value)[1:]))
            leading = max(1, WHOLE_ELEMENTS // (per_slice * self.batches))
            return Observer(False, TENSOR_SAMPLE, leading=min(leading, max(1, 64 // self.batches)))
        return Observer(False, TENSOR_SAMPLE)
