"""Scale reparameterization of norms (RepQuant Eq. 10-14): per-channel scales move into the norm and the Linears that read it.

Afterwards the site has one scale and the same integer codes. Where the norm has other readers it is split: they keep the original
norm, the Linears read a rewritten copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, aten, attribute, constant_node, copy_meta, replace_constant
from repquant_fx.passes.calibrate_activations import install, slot_module
from repquant_fx.passes.match_sites import Group
from repquant_fx.quantizers.observers import UniformQuantizer
from repquant_fx.quantizers.reparameterization import ChannelAffine, reparameterize


class ReparameterizeNorms(Pass):
    name = "reparameterize norms"
    needs = "a per-channel quantizer at every site of a norm group"
    guarantees = "a per-tensor quantizer with the same codes; the float output is unchanged"

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def run(self, graph_module: GraphModule) -> bool:
        group = self.group
        if group.norm is None:
            return False
        quantizer = slot_module(graph_module, group.sites[0])
        if not isinstance(quantizer, UniformQuantizer) or quantizer.axis is None:
            return False
        scale, zero_point = quantizer.exact
        affine = reparameterize(scale, zero_point, quantizer.bits)
        norm = self._split(graph_module) if group.shared_norm else group.norm
        self._rewrite_norm(graph_module, norm, affine)
        for consumer in group.consumers:
            self._rewrite_linear(graph_module, consumer, affine)
        for site in group.sites:
            install(graph_module, site, UniformQuantizer(affine.scale, affine.zero_point, quantizer.bits))
        group.notes.append(f"norm and {len(group.consumers)} linear(s) rewritten: channel scales spanned "
                           f"{float(scale.max() / scale.min()):.3g}x")
        return True

    def _split(self, graph_module: GraphModule) -> Node:
        """Copy the norm, and the layout operators between it and each site, for the Linears alone."""
        norm = self.group.norm
        assert norm is not None
        copies: dict[Node, Node] = {}

        def copy(node: Node) -> Node:
            if node not in copies:
                source = None if node is norm else copy(node.args[0])  # type: ignore[arg-type]
                with graph_module.graph.inserting_after(node):
                    duplicate = graph_module.graph.node_copy(node)
                duplicate.meta = dict(node.meta)
                if source is not None:
                    duplicate.update_arg(0, source)
                copies[node] = duplicate
            return copies[node]

        for site in self.group.sites:
            assert site.slot is not None
            site.value = copy(site.value)
            site.slot.update_arg(0, site.value)
        return copies[norm]

    def _rewrite_norm(self, graph_module: GraphModule, norm: Node, affine: ChannelAffine) -> None:
        path = str(norm.meta.get("module_path") or norm.name)
        weight = _optional(graph_module, norm, 2)
        if norm.target is aten.layer_norm.default:
            bias = _optional(graph_module, norm, 3)
            new_weight, new_bias = affine.rewrite_norm(weight, bias)
            _check(norm, new_weight, new_bias)
            replace_constant(graph_module, norm, 2, new_weight.float(), f"{path}.weight")
            replace_constant(graph_module, norm, 3, new_bias.float(), f"{path}.bias")
            return
        # an RMS norm has no bias: the shift becomes an added constant
        new_weight, new_bias = affine.rewrite_norm(weight, None)
        _check(norm, new_weight, new_bias)
        name = norm.args[2].target if isinstance(norm.args[2] if len(norm.args) > 2 else None, Node) else f"{path}.weight"  # type: ignore[union-attr]
        eps = norm.args[3] if len(norm.args) > 3 else None
        norm.args = (*norm.args[:2], norm.args[2] if len(norm.args) > 2 else None, eps)
        replace_constant(graph_module, norm, 2, new_weight.float(), str(name))
        shift = constant_node(graph_module, str(name).removesuffix("weight") + "shift", new_bias.float(), norm)
        with graph_module.graph.inserting_after(norm):
            added = graph_module.graph.call_function(aten.add.Tensor, (norm, shift))
        copy_meta(norm, added, norm.meta["val"])
        norm.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        for site in self.group.sites:
            site.value = added if site.value is norm else site.value

    def _rewrite_linear(self, graph_module: GraphModule, linear: Node, affine: ChannelAffine) -> None:
        weight_node = linear.args[1]
        assert isinstance(weight_node, Node)
        weight = attribute(graph_module, weight_node).double()
        new_weight, new_bias = affine.rewrite_linear(weight, _optional(graph_module, linear, 2))
        _check(linear, new_weight, new_bias)
        name = str(weight_node.target)
        replace_constant(graph_module, linear, 1, new_weight.float(), name)
        replace_constant(graph_module, linear, 2, new_bias.float(), name.removesuffix("weight") + "bias")


def _optional(graph_module: GraphModule, node: Node, index: int) -> Tensor | None:
    argument = node.args[index] if index < len(node.args) else None
    return attribute(graph_module, argument).double() if isinstance(argument, Node) else None


def _check(node: Node, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(t.float()).all()) for t in tensors):
        raise PassError(f"reparameterizing {node.name} gives values that are not finite in float32; "
                        "its activations span too wide a range: exclude it in the recipe or check the calibration data")
