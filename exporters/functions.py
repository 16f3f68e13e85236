"""The model-local functions of the domain `repquant_fx`: logarithmic quantization out of standard ONNX operators.

They travel inside the file, so that stock ONNX Runtime runs it with nothing installed beside it (a runtime with a
kernel of the same domain and name takes that instead). Log2 quantization is uniform quantization of the logarithm: the
scale is a whole number m of steps, `s = 2^(m / steps)`, so QuantizeLinear of `ln A` with step `ln 2 / steps` and zero
point `2^bits - 1 - m` gives `top - q`. The reserved code of exact zero (`q = top`) is the integer 0, and saturation
below is what an attention mask needs.

| attribute | meaning |
|---|---|
| `axis` | axis of the Softmax |
| `bits` | bits of a code, 2 to 8 |
| `steps` | codes per octave: 2 for the reparameterized log-sqrt2 quantizer (RepQuant Eq. 15-17), 1 for log2 |
| `threshold` | between the level of the zero code and the smallest level that counts |

Inputs: logits (or non-negative values), any shape, float32; `scale`, float32 scalar. Output: float32 of the same shape,
the value `scale * 2^(-q / steps)` of each code q and exactly 0 for the zero code.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx import FunctionProto, TensorProto, helper

from repquant_fx.targets import OPSET

DOMAIN = "repquant_fx"
VERSION = 1


def threshold(scale: float, bits: int, steps: int) -> float:
    """Half a step above the level of the zero code."""
    return float(scale * 2.0 ** ((1.5 - 2**bits) / steps))


def quantizer(scale: float, bits: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Step (float32) and zero point (uint8) of the quantizer of logarithms, as the functions compute them."""
    step = np.float32(math.log(2)) / np.float32(steps)
    return np.asarray(step), np.asarray(2**bits - 1 - np.rint(np.log(np.float32(scale)) / step), np.uint8)


def set_thresholds(model: ir.Model) -> None:
    """Give every call of a function of this domain its `threshold`, from its constant scale."""
    for node in model.graph:
        scale = node.inputs[1].const_value if node.domain == DOMAIN and node.inputs[1] is not None else None
        if scale is not None:
            bits, steps = (node.attributes[name].as_int() for name in ("bits", "steps"))
            node.attributes["threshold"] = ir.AttrFloat32("threshold", threshold(float(scale.numpy()), bits, steps))


def log2_softmax() -> FunctionProto:
    """`Log2Softmax(logits, scale) <axis, bits, steps, threshold>`: Softmax, log-quantized."""
    log = helper.make_node("LogSoftmax", ["logits"], ["log_a"])
    _reference(log, "axis", "INT")
    return _function(
        "Log2Softmax",
        ["logits", "scale"],
        ["axis", "bits", "steps", "threshold"],
        [log],
        "Softmax whose values are stored as `bits`-bit logarithmic codes: a shift of the scale by code / steps "
        "octaves.",
    )


def log2_quantize() -> FunctionProto:
    """`Log2Quantize(values, scale) <bits, steps, threshold>`: non-negative values, log-quantized."""
    log = helper.make_node("Log", ["values"], ["log_a"])
    return _function("Log2Quantize", ["values", "scale"], ["bits", "steps", "threshold"], [log],
                     "Values stored as `bits`-bit logarithmic codes: a shift of the scale by code / steps octaves.")


def _function(name: str, inputs: list[str], attributes: list[str], head: list, doc: str) -> FunctionProto:
    def constant(output: str, value: float | int, dtype: int) -> object:
        return helper.make_node("Constant", [], [output], value=helper.make_tensor(output, dtype, [], [value]))

    def attribute(output: str, source: str) -> object:
        node = helper.make_node("Constant", [], [output])
        _reference(node, source, "INT", "value_int")
        return node

    rectify = helper.make_node("ThresholdedRelu", ["level"], ["output"])
    _reference(rectify, "threshold", "FLOAT", "alpha")
    nodes = [
        # constants of the quantizer, folded when a session is created
        attribute("bits_int", "bits"),
        attribute("steps_int", "steps"),
        helper.make_node("Cast", ["bits_int"], ["bits_float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["steps_int"], ["steps_float"], to=TensorProto.FLOAT),
        constant("two", 2.0, TensorProto.FLOAT),
        constant("one", 1.0, TensorProto.FLOAT),
        constant("ln2", math.log(2), TensorProto.FLOAT),
        helper.make_node("Pow", ["two", "bits_float"], ["codes"]),
        helper.make_node("Sub", ["codes", "one"], ["top_float"]),
        helper.make_node("Cast", ["top_float"], ["top"], to=TensorProto.UINT8),
        helper.make_node("Div", ["ln2", "steps_float"], ["step"]),
        helper.make_node("Log", ["scale"], ["log_scale"]),
        helper.make_node("Div", ["log_scale", "step"], ["exponent_float"]),
        helper.make_node("Round", ["exponent_float"], ["exponent"]),
        helper.make_node("Sub", ["top_float", "exponent"], ["zero_point_float"]),
        helper.make_node("Cast", ["zero_point_float"], ["zero_point"], to=TensorProto.UINT8),
        # quantize
        *head,
        helper.make_node("QuantizeLinear", ["log_a", "step", "zero_point"], ["unbounded"]),
        helper.make_node("Min", ["unbounded", "top"], ["code"]),
        # dequantize: scale * 2^(-q / steps), and 0 for the zero code
        helper.make_node("DequantizeLinear", ["code", "step", "zero_point"], ["log_level"]),
        helper.make_node("Exp", ["log_level"], ["level"]),
        rectify,
    ]
    return helper.make_function(DOMAIN, name, inputs, ["output"], nodes, [helper.make_opsetid("", OPSET)], attributes,
                                doc_string=doc)


def _reference(node: object, source: str, kind: str, name: str | None = None) -> None:
    """Let an attribute of `node` take the value of the function's attribute `source`."""
    from onnx import AttributeProto

    attribute = node.attribute.add()  # type: ignore[attr-defined]
    attribute.name, attribute.ref_attr_name = name or source, source
    attribute.type = getattr(AttributeProto, kind)
