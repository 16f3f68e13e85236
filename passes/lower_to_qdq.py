"""Lower to Q/DQ: every quantizer becomes operators that each have one ONNX counterpart (`repquant_fx.ops`).

Placement is what ONNX Runtime fuses: quantize and dequantize stand only on the operands of matrix products and
convolutions; a Linear runs on a matrix (so that it becomes Gemm) with an integer weight and an int32 bias whose scale
is the product of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.naming import QUANTIZED, SCALE, SHIFT, ZERO_POINT, site_stem
from repquant_fx.passes.base import (
    Made,
    Pass,
    aten,
    attribute,
    constant_node,
    copy_meta,
    free_stem,
    module_path,
    replace_constant,
    shape_of,
)
from repquant_fx.passes.match_sites import Plan, Site
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import DEQUANTIZE, LAYOUT, LOG2_QUANTIZE, LOG2_SOFTMAX, QUANTIZE, SOFTMAX
from repquant_fx.passes.slots import slot_module, slot_of
from repquant_fx.passes.spec import LOWERED, OBSERVED
from repquant_fx.quantizers.bias import round_bias
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import LogQuantizer, Observer, Passthrough, UniformQuantizer
from repquant_fx.quantizers.uniform import storable


@dataclass(frozen=True)
class Lowered:
    """Where things are in a lowered graph.

    Attributes:
        quantizers: the node that produces each site's codes (or log-quantized values), by site name.
        constants: names of tensors: each site's scale, by site name, and each weight's codes, by its consumer's.
    """

    quantizers: dict[str, Node]
    constants: dict[str, str]


class LowerToQDQ(Pass[Lowered]):
    """Activations (float32, any shape) become uint8 codes of that shape and float32 again; weights (out, in) are int8
    with a float32 scale (out,), biases (out,) int32. A Linear runs on a matrix (rows, in), or with `flat=False` on its
    input as it is; where its activation stays in float it is a MatMul with the transposed weight (in, out), which
    runtimes have kernels of weights alone for.
    """

    name = "lower to Q/DQ"
    needs = "a quantizer at every site and the integer codes of every quantized weight"
    guarantees = (
        "quantizers are `repquant_fx` operators, weights integer codes and biases int32 where their scale is known"
    )
    takes, gives = OBSERVED, LOWERED

    def __init__(self, plan: Plan, weights: dict[Node, QuantizedWeight], *, flat: bool = True) -> None:
        super().__init__()
        self.plan, self.weights, self.flat = plan, weights, flat

    def run(self, graph_module: GraphModule) -> Made[Lowered]:
        sites = [site for group in self.plan.groups for site in group.sites]
        slots = {str(slot_of(graph_module, site).target).partition(".")[0] for site in sites}
        codes = {consumer.name: str(cast(Node, consumer.args[1].args[0]).target)  # type: ignore[union-attr]
                 for consumer in self.weights}
        lowered = [(site.name, self._lower_site(graph_module, site)) for site in sites]
        for name in slots:
            delattr(graph_module, name)
        _merge_reshapes(graph_module)
        graph_module.graph.eliminate_dead_code()
        refresh_metadata(graph_module)
        quantizers = {name: node for name, node in lowered if node is not None}
        constants = {name: str(cast(Node, node.args[1]).target) for name, node in quantizers.items()}
        return Made(True, Lowered(quantizers, constants | codes))

    def requires(self, graph_module: GraphModule) -> None:
        super().requires(graph_module)
        for site in (site for group in self.plan.groups for site in group.sites):
            if isinstance(slot_module(graph_module, site), Observer):
                raise PassError(f"{site.name} holds an observer, not a quantizer: calibrate its group first")

    def _lower_site(self, graph_module: GraphModule, site: Site) -> Node | None:
        """The node that produces its codes; None for what stays in float."""
        slot = slot_of(graph_module, site)
        module, source = graph_module.get_submodule(str(slot.target)), slot.args[0]
        assert isinstance(source, Node)
        codes: Node | None = None
        if isinstance(module, Passthrough):
            slot.replace_all_uses_with(source)
            for consumer in site.consumers:
                if consumer in self.weights and consumer.target is aten.linear.default:
                    _multiply(graph_module, consumer)
        elif isinstance(module, LogQuantizer):
            codes, value = self._log(graph_module, site, slot, module)
            slot.replace_all_uses_with(value)
        else:
            assert isinstance(module, UniformQuantizer)
            linears = [c for c in site.consumers if c.target is aten.linear.default]
            if self.flat and linears and len(linears) == len(site.consumers):
                codes = self._lower_linears(graph_module, site, slot, module, linears)
            else:
                codes, value = self._quantize(graph_module, site, source, module, slot)
                for consumer in site.consumers:
                    if consumer in self.weights:
                        self._lower_bias(graph_module, consumer, module)
                slot.replace_all_uses_with(value)
        if not slot.users:
            graph_module.graph.erase_node(slot)
        return codes

    def _lower_linears(self, graph_module: GraphModule, site: Site, slot: Node, quantizer: UniformQuantizer,
                       linears: list[Node]) -> Node:
        """One flat, quantized input shared by all Linears of the site; the node that produces its codes."""
        graph, source, shape = graph_module.graph, cast(Node, slot.args[0]), shape_of(slot)
        flat = source
        if len(shape) != 2:
            with graph.inserting_before(slot):
                flat = copy_meta(slot, graph.call_function(aten.reshape.default, (source, [-1, shape[-1]])))
        codes, value = self._quantize(graph_module, site, flat, quantizer, slot)
        for linear in linears:
            self._lower_bias(graph_module, linear, quantizer)
            linear.update_arg(0, value)
            if len(shape) != 2:
                _restore_shape(graph_module, linear, source)
        return codes

    def _quantize(
        self, graph_module: GraphModule, site: Site, source: Node, quantizer: UniformQuantizer, before: Node
    ) -> tuple[Node, Node]:
        """(the codes, the values that they stand for), inserted before `before`."""
        stem, bits, graph = free_stem(graph_module, site_stem(site.name)), quantizer.bits, graph_module.graph
        axis, shift = -1, None
        scale, zero_point = quantizer.scale, quantizer.zero_point
        if quantizer.axis is not None:
            axis = len(shape_of(source)) - 1 if source is before.args[0] else 1  # a Linear's input was made a matrix
            zero_point, moved = storable(scale, zero_point, bits)
            if moved is not None:
                shift = constant_node(graph_module, SHIFT.of(stem), moved, before)
        s = constant_node(graph_module, SCALE.of(stem), scale, before)
        z = constant_node(graph_module, ZERO_POINT.of(stem), zero_point.to(torch.uint8), before)
        with graph.inserting_before(before):
            if shift is not None:
                source = copy_meta(before, graph.call_function(aten.add.Tensor, (source, shift)))
            codes = copy_meta(before, graph.call_function(QUANTIZE, (source, s, z, bits, axis)))
            value = copy_meta(before, graph.call_function(DEQUANTIZE, (codes, s, z, bits, axis)))
            if shift is not None:
                value = copy_meta(before, graph.call_function(aten.sub.Tensor, (value, shift)))
        return codes, value

    def _log(self, graph_module: GraphModule, site: Site, slot: Node, quantizer: LogQuantizer) -> tuple[Node, Node]:
        """(the log-quantized values, what the slot's readers read now): made by the Softmax itself, where the product
        is all that reads it; else by a quantizer of its result.
        """
        graph, source = graph_module.graph, cast(Node, slot.args[0])
        softmax = _sole_softmax(slot)
        before = slot if softmax is None else softmax
        scale = constant_node(
            graph_module, SCALE.of(free_stem(graph_module, site_stem(site.name))), quantizer.scale, before
        )
        if softmax is None:
            with graph.inserting_before(before):
                result = graph.call_function(LOG2_QUANTIZE, (source, scale, quantizer.bits, quantizer.steps))
            return copy_meta(before, result), result
        dim = cast(int, softmax.args[1]) % len(shape_of(softmax))
        with graph.inserting_before(softmax):
            result = graph.call_function(LOG2_SOFTMAX, (softmax.args[0], scale, dim, quantizer.bits, quantizer.steps))
        copy_meta(softmax, result)
        softmax.replace_all_uses_with(result)
        graph.erase_node(softmax)
        return result, (result if source is softmax else source)

    def _lower_bias(self, graph_module: GraphModule, consumer: Node, quantizer: UniformQuantizer) -> None:
        """An int32 bias, where the activation has one scale: the weight holds integer codes already."""
        scale, graph = self.weights[consumer].scale, graph_module.graph
        bias = consumer.args[2] if len(consumer.args) > 2 else None
        if not isinstance(bias, Node):
            return
        if bias.op != "get_attr" or quantizer.axis is not None:
            why = "it is no constant" if bias.op != "get_attr" else (
                "its input has one scale per channel, so the product has no one scale")
            self.leave(consumer, f"its bias stays in float: {why}")
            return
        rounded = round_bias(attribute(graph_module, bias), quantizer.scale, scale)
        if rounded is None:
            raise PassError(f"{module_path(consumer)}: in steps of its product the bias does not fit int32")
        stem = free_stem(graph_module, str(bias.target))
        b = constant_node(graph_module, QUANTIZED.of(stem), rounded.codes, consumer)
        bs = constant_node(graph_module, SCALE.of(stem), rounded.scale, consumer)
        with graph.inserting_before(consumer):
            restored = copy_meta(consumer, graph.call_function(DEQUANTIZE, (b, bs, None, 32, 0)))
        consumer.update_arg(2, restored)
        if not bias.users:
            graph.erase_node(bias)


def _multiply(graph_module: GraphModule, linear: Node) -> None:
    """A Linear of an activation in float as the product with a weight of shape (in, out), and its bias after it."""
    graph, (source, weight, *bias) = graph_module.graph, linear.args
    assert isinstance(weight, Node)
    codes, scale, zero_point, bits, axis, *block = weight.args
    for constant in (codes, scale, zero_point):
        if isinstance(constant, Node) and (value := attribute(graph_module, constant)).ndim > 1:
            replace_constant(graph_module, weight, weight.args.index(constant), value.T.contiguous(),
                             str(constant.target))
    weight.args = (*weight.args[:3], bits, 1 - cast(int, axis), *block)
    if not bias or bias[0] is None:
        linear.target, linear.args = aten.matmul.default, (source, weight)
        return
    with graph.inserting_before(linear):
        product = copy_meta(linear, graph.call_function(aten.matmul.default, (source, weight)), linear.meta["val"])
    linear.target, linear.args = aten.add.Tensor, (product, bias[0])


def _restore_shape(graph_module: GraphModule, linear: Node, source: Node) -> None:
    """Give a flattened Linear's readers the leading axes of `source` back."""
    outputs = linear.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
    with graph_module.graph.inserting_after(linear):
        restored = graph_module.graph.call_function(aten.reshape.default)
    linear.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    with graph_module.graph.inserting_before(restored):
        restored.args = (linear, [*_sizes(graph_module, source), outputs])
    copy_meta(linear, restored, linear.meta["val"])  # a Linear that reads it directly asks for its shape


def _merge_reshapes(graph_module: GraphModule) -> None:
    """A reshape of a reshape reads the first one's input."""
    for node in graph_module.graph.nodes:
        if node.target is aten.reshape.default:
            while node.args[0].target is aten.reshape.default:
                node.update_arg(0, node.args[0].args[0])


def _sole_softmax(slot: Node) -> Node | None:
    """The Softmax behind a slot, when only layout operators stand between and nothing else reads any of them."""
    node = slot.args[0]
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target in SOFTMAX:
            return node
        if node.target not in LAYOUT:
            return None
        node = node.args[0]
    return None


def _sizes(graph_module: GraphModule, value: Node) -> list[Any]:
    """Sizes of all axes but the last: at most one -1, further symbolic ones read from `value`."""
    sizes: list[Any] = []
    for axis, size in enumerate(shape_of(value)[:-1]):
        if isinstance(size, int):
            sizes.append(size)
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            node = graph_module.graph.call_function(aten.sym_size.int, (value, axis))
            node.meta["val"] = size
            sizes.append(node)
    return sizes
