"""Slots: the module nodes that stand at a graph's sites, observers while calibrating and quantizers afterwards.

The graph itself says where they are: a slot's node carries the name of its site.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.passes.spec import SITE
from repquant_fx.quantizers.observers import LogQuantizer, Observer


def mark(slot: Node, site: Site) -> None:
    """Make a node that calls a module the slot of a site."""
    slot.meta[SITE] = site.name


def slot_of(graph_module: GraphModule, site: Site) -> Node:
    """The node of a site's slot; its only argument is the site's value.

    Raises:
        PassError: no observer was inserted.
    """
    for node in graph_module.graph.find_nodes(op="call_module", sort=False):
        if node.meta.get(SITE) == site.name:
            return node
    raise PassError(f"{site.name} has no observer; run `insert observers` first")


def slot_module(graph_module: GraphModule, site: Site) -> nn.Module:
    """The module in a site's slot.

    Raises:
        PassError: no observer was inserted.
    """
    return graph_module.get_submodule(str(slot_of(graph_module, site).target))


def observer(graph_module: GraphModule, site: Site) -> Observer:
    """The observer in a site's slot.

    Raises:
        PassError: no observer was inserted, or it was replaced by a quantizer.
    """
    module = slot_module(graph_module, site)
    if not isinstance(module, Observer):
        raise PassError(f"{site.name} holds a {type(module).__name__}, not an observer")
    return module


def log_quantizers(graph_module: GraphModule, group: Group) -> Iterator[tuple[Site, LogQuantizer]]:
    """The sites of a group that hold a logarithmic quantizer, with it."""
    for site in group.sites:
        module = slot_module(graph_module, site)
        if isinstance(module, LogQuantizer):
            yield site, module


def install(graph_module: GraphModule, site: Site, module: nn.Module) -> None:
    """Put `module` in a site's slot."""
    graph_module.set_submodule(str(slot_of(graph_module, site).target), module)
