"""Record statistics: summaries of a group's samples for the HTML report, taken between calibration and reparameterization."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from repquant_fx.passes.base import Pass
from repquant_fx.passes.calibrate_activations import slot_module
from repquant_fx.passes.match_sites import Group
from repquant_fx.quantizers.observers import LogQuantizer, Observer, UniformQuantizer
from repquant_fx.quantizers.reparameterization import reparameterize
from repquant_fx.statistics import Statistics, channels, probabilities, values


class RecordStatistics(Pass):
    """Make it while the group's observers are in the graph, run it when quantizers have replaced them."""

    name = "record statistics"
    needs = "the group's calibrated quantizers; its observers when the pass is made"
    guarantees = "the graph is unchanged"

    def __init__(self, graph_module: GraphModule, group: Group, statistics: Statistics, *, reparameterized: bool) -> None:
        super().__init__()
        self.group, self.statistics, self.reparameterized = group, statistics, reparameterized
        modules = {site.name: slot_module(graph_module, site) for site in group.sites}
        self.observers = {name: module for name, module in modules.items() if isinstance(module, Observer)}

    def run(self, graph_module: GraphModule) -> bool:
        seen = self.statistics.activations
        norm_sites = [s for s in self.group.sites if s.role == "norm" and s.name in self.observers]
        if norm_sites:
            first = norm_sites[0]
            quantizer = slot_module(graph_module, first)
            assert isinstance(quantizer, UniformQuantizer)
            sample = torch.cat([self.observers[s.name].sample() for s in norm_sites], dim=1)
            affine = reparameterize(*quantizer.exact, quantizer.bits) if self.reparameterized and quantizer.axis is not None else None
            seen[first.name] = channels(sample, quantizer, affine)
            seen.update({s.name: {"same_as": first.name} for s in norm_sites[1:]})
        for site in self.group.sites:
            module = slot_module(graph_module, site)
            if site.name in seen or site.name not in self.observers:
                continue
            sample = self.observers[site.name].sample()
            if isinstance(module, LogQuantizer):
                seen[site.name] = probabilities(sample, module)
            elif isinstance(module, UniformQuantizer):
                seen[site.name] = values(sample, module)
        return False
