"""Scale reparameterization of norms (RepQuant Eq. 10-14): per-channel scales move into the norm and the Linears that
read it.

Afterwards the site has one scale and the same integer codes. Where the norm has other readers it is split: they keep
the original norm, the Linears read a rewritten copy.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import CalibrationError
from repquant_fx.naming import beside
from repquant_fx.passes.base import Made, Pass, aten, constant_node, copy_meta
from repquant_fx.passes.match_sites import Group, Site
from repquant_fx.passes.operators import AFFINE, PARAMETERS
from repquant_fx.passes.parameters import parameters, set_parameters, weight_and_bias
from repquant_fx.passes.slots import install, slot_module, slot_of
from repquant_fx.passes.spec import OBSERVED
from repquant_fx.quantizers.observers import UniformQuantizer
from repquant_fx.quantizers.reparameterization import ChannelAffine, reparameterize


class ReparameterizeNorms(Pass[str | None]):
    """Makes the sentence that says so in the report, None where nothing was rewritten.

    Norm and Linears keep the shapes and float32 of their constants; where one has no weight or bias, it gets one.
    """

    name = "reparameterize norms"
    needs = "a per-channel quantizer at every site of a norm group"
    guarantees = "a per-tensor quantizer with the same codes; the float output is unchanged"
    takes = gives = OBSERVED
    identity = "float"

    def __init__(self, group: Group, *, symmetric: bool = False) -> None:
        super().__init__()
        self.group, self.symmetric = group, symmetric

    def run(self, graph_module: GraphModule) -> Made[str | None]:
        group = self.group
        if group.norm is None:
            return Made(False, None)
        quantizer = slot_module(graph_module, group.sites[0])
        if not isinstance(quantizer, UniformQuantizer) or quantizer.axis is None:
            return Made(False, None)
        scale, zero_point = quantizer.exact
        affine = reparameterize(scale, zero_point, quantizer.bits, symmetric=self.symmetric)
        norm = self._split(graph_module) if group.shared_norm else group.norm
        self._rewrite_norm(graph_module, norm, affine)
        for consumer in group.consumers:
            self._rewrite_linear(graph_module, consumer, affine)
        for site in group.sites:
            install(graph_module, site, UniformQuantizer(affine.scale, affine.zero_point, quantizer.bits))
        spread = float(scale.max() / scale.min())
        what = "affine" if group.norm.target is AFFINE else "norm"
        rewritten = f"{what} and {len(group.consumers)} linear(s) rewritten"
        return Made(True, f"{rewritten}: channel scales spanned {spread:.3g}x")

    def _split(self, graph_module: GraphModule) -> Node:
        """Copy the norm, and the layout operators between it and each site, for the Linears alone."""
        norm = self.group.norm
        assert norm is not None
        copies: dict[Node, Node] = {}
        after = descendants(norm)

        def copy(node: Node) -> Node:
            if node not in copies:
                mapping = {p: copy(p) for p in node.all_input_nodes if node is not norm and (p in after or p is norm)}
                with graph_module.graph.inserting_after(node):
                    duplicate = graph_module.graph.node_copy(node, lambda n: mapping.get(n, n))
                duplicate.meta = dict(node.meta)
                copies[node] = duplicate
            return copies[node]

        for site in self.group.sites:
            slot_of(graph_module, site).update_arg(0, copy(site.value))
        return copies[norm]

    def _rewrite_norm(self, graph_module: GraphModule, norm: Node, affine: ChannelAffine) -> None:
        weight, bias = parameters(graph_module, norm)
        new_weight, new_bias = affine.rewrite_norm(weight, bias)
        _check(norm, new_weight, new_bias)
        if len(PARAMETERS[norm.target]) == 2 and not self.group.padded:
            set_parameters(graph_module, norm, new_weight, new_bias)
            return
        # an RMS norm has no bias, and zeros padded in after a norm must be shifted too: the shift is added where it is
        # needed
        set_parameters(graph_module, norm, new_weight, None if bias is None else new_bias - affine.added)
        if not bool(affine.added.any()):
            return
        name = beside(str(cast(Node, norm.args[2]).target), "shift")
        for site in self.group.sites:
            self._add_shift(graph_module, site, name, affine.added.float())

    def _add_shift(self, graph_module: GraphModule, site: Site, name: str, shift: Tensor) -> None:
        slot = slot_of(graph_module, site)
        value = slot.args[0]
        assert isinstance(value, Node)
        constant = constant_node(graph_module, name, shift, slot)
        with graph_module.graph.inserting_before(slot):
            added = graph_module.graph.call_function(aten.add.Tensor, (value, constant))
        copy_meta(value, added, value.meta["val"])
        slot.update_arg(0, added)

    def _rewrite_linear(self, graph_module: GraphModule, linear: Node, affine: ChannelAffine) -> None:
        weight, bias = affine.rewrite_linear(*weight_and_bias(graph_module, linear))
        _check(linear, weight, bias)
        set_parameters(graph_module, linear, weight, bias)


def descendants(node: Node) -> set[Node]:
    """All nodes whose value depends on `node`'s."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def _check(node: Node, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(t.float()).all()) for t in tensors):
        raise CalibrationError(
            f"reparameterizing {node.name} gives values that are not finite in float32; its activations span too wide "
            "a range: exclude it in the recipe or check the calibration data"
        )
