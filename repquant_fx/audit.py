"""Which quantized products of a file a runtime really executes with integers: read from the graph that ONNX Runtime
optimizes for itself, or from the one that OpenVINO executes (see `executed`).

A quantized file says what is computed; the runtime decides how. Where it cannot match the Q/DQ pattern around a
product, it dequantizes both operands and multiplies in float, which is slower than the float model.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from repquant_fx.errors import ModelFileError
from repquant_fx.executed import executed_kernels
from repquant_fx.exporters.apart import SMALLEST, OnnxModel
from repquant_fx.exporters.operators import LAYOUT, PRODUCTS
from repquant_fx.exporters.reading import OnnxFile, parse_onnx, read_onnx
from repquant_fx.files import scratch
from repquant_fx.runtime import Loadable, content, give, session_options
from repquant_fx.targets import RUNTIMES

INTEGER = {
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "QLinearConv",
    "ConvInteger",
    "QAttention",
}
WEIGHTS_ALONE = "MatMulNBits"
LOGARITHMIC = {"Log2Softmax", "Log2Quantize"}


@dataclass(frozen=True)
class Product:
    """One MatMul, Gemm or Conv of a file whose operands are both quantized, or the right one alone, a weight.

    Attributes:
        path: module path, the node's name without its operator.
        node: the node's name.
        op: `MatMul`, `Gemm` or `Conv`.
        kernel: the operator that the runtime runs in its place, "" where it is not found under its name.
        integer: whether that multiplies integers; of a weight alone, whether it reads the codes as they are.
        reason: why not, "" where it does.
        weight_only: the left operand is float.
    """

    path: str
    node: str
    op: str
    kernel: str
    integer: bool
    reason: str
    weight_only: bool = False


def audit(model: Loadable, runtime: str = "ort") -> list[Product]:
    """The quantized products of a model, in graph order, and what a runtime makes of each on this CPU.

    Args:
        model: what `runtime.session` takes; bytes are screened.
        runtime: `ort`, or `openvino` where it is installed.

    Raises:
        ModelFileError: not an ONNX model, or the runtime refuses it.
    """
    if isinstance(model, (str, Path)):
        model = read_onnx(model)
    if isinstance(model, bytes):
        apart = OnnxModel(parse_onnx(model, "the model"))
    else:
        apart = model.apart if isinstance(model, OnnxFile) else OnnxModel.of(model)
    proto = apart.proto
    if runtime == "openvino":
        kernels = executed_kernels(apart, (node.name for node in proto.graph.node if node.op_type in PRODUCTS))
    else:
        kernels = {node.name: (node.op_type, node.op_type in INTEGER) for node in _optimized(model).graph.node}
    producers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name for tensor in proto.graph.initializer}
    products = []
    for node in proto.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        left, right = (_origin(name, producers) for name in node.input[:2])
        weight_only = left is None and right is not None and _is_constant(right.input[0], producers, constants)
        if right is None or (left is None and not weight_only):
            continue  # an operand is float on purpose
        kernel, integer = kernels.get(node.name, ("", False))
        if weight_only:
            if runtime != "ort":
                continue  # nothing in the executed graph says how it reads them
            integer = kernel == WEIGHTS_ALONE
            reason = "" if integer else f"ONNX Runtime dequantizes the weight and runs {kernel or 'another operator'}"
        else:
            assert left is not None
            reason = "" if integer else _why_float(runtime, node.op_type, [left, right], kernel, proto)
        products.append(Product(node.name.rsplit("/", 1)[0], node.name, node.op_type, kernel, integer, reason,
                                weight_only))
    return products


def summary(products: Iterable[Product], runtime: str = "ort") -> str:
    """One line: how many run with integers, or with weights as they are packed, and why the others do not."""
    products = list(products)
    alone = [product for product in products if product.weight_only]
    both = [product for product in products if not product.weight_only]
    kinds = ((both, "quantized products run as integer kernels"),
             (alone, f"products with weights alone quantized read their codes ({WEIGHTS_ALONE})"))
    return ". ".join(_counted(some, words, runtime) for some, words in kinds if some or (some is both and not alone))


def _counted(products: Sequence[Product], words: str, runtime: str) -> str:
    lost: dict[str, int] = {}
    for product in products:
        if not product.integer:
            lost[product.reason] = lost.get(product.reason, 0) + 1
    integer = sum(p.integer for p in products)
    text = f"{integer} of {len(products)} {words} under {RUNTIMES[runtime]}"
    return text + "".join(f"; {count} in float: {reason}" for reason, count in lost.items())


def _optimized(model: Loadable) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs, without what its weights hold: these go nowhere, where a system has that."""
    data, apart = content(model)
    with scratch() as folder:
        path, weights = folder / "optimized.onnx", folder / "weights"
        if os.name == "posix":
            weights.symlink_to(os.devnull)
        options = session_options()
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights.name)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes",
                                         str(SMALLEST))
        kept = give(options, apart)
        try:
            onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFileError(
                f"ONNX Runtime cannot load the model: {(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error
        del kept
        return onnx.load(str(path), load_external_data=False)


def _is_constant(name: str, producers: Mapping[str, onnx.NodeProto], constants: Container[str]) -> bool:
    """Whether codes are constant, packed or not."""
    node = producers.get(name)
    return (name if node is None or node.op_type != "Cast" else node.input[0]) in constants


def _origin(name: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The node that dequantizes a product's operand; None where it is float."""
    node = producers.get(name)
    while node is not None and node.op_type in LAYOUT:
        node = producers.get(node.input[0])
    if node is None or node.op_type == "DequantizeLinear" or _is_logarithmic(node, producers):
        return node
    return None


def _is_logarithmic(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a node gives powers of two: one of our functions, or the end of what it was inlined to."""
    if node.op_type != "ThresholdedRelu":
        return node.op_type in LOGARITHMIC
    exponential = producers.get(node.input[0])
    level = producers.get(exponential.input[0]) if exponential is not None and exponential.op_type == "Exp" else None
    return level is not None and level.op_type == "DequantizeLinear"


def _narrow(origins: Iterable[onnx.NodeProto], four_bit: set[str]) -> bool:
    """Whether one dequantizes UINT4 or INT4 (its zero point, or constant codes, say so)."""
    return any(name in four_bit for node in origins for name in (*node.input[:1], *node.input[2:]))


def _why_float(runtime: str, op: str, origins: list[onnx.NodeProto], kernel: str, proto: onnx.ModelProto) -> str:
    """The reason for which a runtime multiplies two quantized operands in float."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    if runtime == "openvino":
        return _openvino_reason(origins, kernel, constants)
    narrow = (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
    four_bit = {name for name, tensor in constants.items() if tensor.data_type in narrow}
    return _reason(op, origins, kernel, _narrow(origins, four_bit))


POWERS = "the powers of two of a logarithmic operand are multiplied in float"


def _reason(op: str, origins: list[onnx.NodeProto], kernel: str, narrow: bool) -> str:
    if any(node.op_type != "DequantizeLinear" for node in origins):
        return POWERS
    activation = origins[0]
    if any(attribute.name == "axis" and attribute.i not in (1,) for attribute in activation.attribute):
        return "the activation has one scale per channel"
    if narrow:
        return "UINT4 and INT4 operands have no integer kernel on the CPU"
    if op == "Conv":
        return "a convolution has an integer kernel only where its output is quantized too"
    if not kernel:
        return "not found in the optimized graph"
    return f"ONNX Runtime did not match the Q/DQ pattern and runs {kernel}"


def _openvino_reason(origins: list[onnx.NodeProto], kernel: str, constants: Mapping[str, onnx.TensorProto]) -> str:
    if any(node.op_type != "DequantizeLinear" for node in origins):
        return POWERS
    zero_points = [constants.get(node.input[2]) for node in origins if len(node.input) > 2]
    shifted = any(zero is not None and onnx.numpy_helper.to_array(zero).any() for zero in zero_points)
    if shifted and not any(node.input[0] in constants for node in origins):
        return "OpenVINO multiplies two activations as integers only without zero points (the setting `symmetric`)"
    if not kernel:
        return "not found in the executed graph"
    return f"OpenVINO runs {kernel}"
