"""Do this machine's processor and a file fit: will sums of integer products saturate?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx import processor
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.operators import LAYOUT, PRODUCTS
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.passes.base import attribute
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.quantizers.saturation import can_saturate, saturating_product
from repquant_fx.recorder import Recorder

BYTE = 255


def saturating_layers(model: onnx.ModelProto | OnnxModel) -> list[str]:
    """Names of the products of a file in which a sum of two products may leave 16 bits."""
    model = OnnxModel.of(model)
    graph = model.proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in PRODUCTS or node.domain:
            continue
        codes = _weight(node, producers, constants, model)
        if codes is not None and codes.size:
            top = _top(_operand(node, 0), producers, constants)
            if top and bool(can_saturate(torch.from_numpy(codes), top).any()):
                found.append(node.name)
    return found


def misfit(model: onnx.ModelProto | OnnxModel) -> str:
    """A sentence where this processor and a file do not fit; empty where they do."""
    if not processor.saturates():
        return ""
    layers = saturating_layers(model)
    if not layers:
        return ""
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return (f"this processor has no VNNI: 8-bit weights may make sums of {layers[0]!r}{more} saturate in 16 bits, and "
            "answers wrong; repquant_fx.session() takes ONNX Runtime's exact kernels, other sessions need "
            "session.x64quantprecision = 1, and --target ort-cpu-avx2 gives weights that are safe everywhere")


@torch.no_grad()
def run_saturating(graph_module: GraphModule, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a lowered graph, with the sums in its Linears that a processor without VNNI gets."""
    linears = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    operands: dict[Node, tuple[Any, Any]] = {
        node: (node.args[0], node.args[1]) for node in linears
        if all(isinstance(each, Node) and each.target is DEQUANTIZE for each in node.args[:2])
    }
    codes: dict[Node, Tensor] = {}

    def visit(node: Node, value: Any) -> Any:
        if node not in operands:
            codes[node] = value
            return value
        activation, weight = operands[node]
        a, w = codes[activation.args[0]], attribute(graph_module, weight.args[0])
        lost = saturating_product(a, w) - (a.double() @ w.double().T).long()
        step = attribute(graph_module, activation.args[1]).double() * attribute(graph_module, weight.args[1]).double()
        return value + (lost * step).to(value.dtype)

    wanted = [*operands, *(activation.args[0] for activation, _ in operands.values())]
    return tensors_in(Recorder(graph_module, wanted, visit).run(*inputs))


def _weight(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], constants: Mapping[str, TensorProto],
            model: OnnxModel) -> np.ndarray | None:
    """Codes of a constant weight of bytes or less, one row for each output channel."""
    dequantize = producers.get(_operand(node, 1))
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    name = _operand(dequantize, 0)
    unpack = producers.get(name)
    tensor = constants.get(_operand(unpack, 0) if unpack is not None and unpack.op_type == "Cast" else name)
    if tensor is None or tensor.data_type not in (TensorProto.INT8, TensorProto.INT4) or len(tensor.dims) < 2:
        return None
    codes = model.array(tensor).astype(np.int8)
    rows = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
    return codes if rows else np.ascontiguousarray(codes.swapaxes(0, -1))


def _top(name: str, producers: Mapping[str, onnx.NodeProto], constants: Mapping[str, TensorProto]) -> int:
    """The highest code of an activation; 0 where it is float."""
    node = producers.get(name)
    dequantized = False
    while node is not None and (node.op_type in LAYOUT or (node.op_type == "DequantizeLinear" and not dequantized)):
        dequantized |= node.op_type == "DequantizeLinear"
        node = producers.get(_operand(node, 0))
    if not dequantized:
        return 0
    bound = constants.get(_operand(node, 1)) if node is not None and node.op_type == "Min" else None
    if bound is None or bound.data_type != TensorProto.UINT8:
        return BYTE
    return int(numpy_helper.to_array(bound).max(initial=0))


def _operand(node: onnx.NodeProto, index: int) -> str:
    """The name of an input; empty where there is none."""
    return node.input[index] if index < len(node.input) else ""
