"""Names that read well in Netron: nodes and values are called after the module that made them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from repquant_fx.naming import DEQUANTIZED, QUANTIZED, ROUNDED, SCALE, Names, Suffix, onnx_input, onnx_node, onnx_output
from repquant_fx.passes.base import NO_MODULE

PARAMETERS = {
    "Reshape": ["data", "shape"], "Expand": ["input", "shape"], "Min": ["input", "top"], "Gather": ["data", "indices"],
    "Slice": ["data", "starts", "ends", "axes", "steps"], "Split": ["input", "split"], "ReduceMean": ["data", "axes"],
    "Pad": ["data", "pads", "value", "axes"], "Squeeze": ["data", "axes"], "Unsqueeze": ["data", "axes"],
}
SCOPES = "pkg.torch.onnx.name_scopes"
# what the exporter calls constants
INVENTED = re.compile(r"(val|val_shape|anonymous|tmp|_?scalar|_?inlined|const)_?\d*(_.*)?")
OWN = "own:"  # before the names of inputs, outputs and parameters, until everything else is named


def set_apart(model: ir.Model) -> None:
    """Mark the names of inputs, outputs and parameters: a parameter may be called `val_0`, as what the exporter invents
    is.
    """
    graph = model.graph
    for value in dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values()]):
        _rename(value, OWN + str(value.name))


def separate_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """An output that is given twice becomes two values, each with its own of `names`; before `name_by_module`."""
    seen: set[ir.Value] = set()
    for index, (value, name) in enumerate(zip(list(model.graph.outputs), names, strict=True)):
        if value in seen:
            copy = ir.Node("", "Identity", [value])
            copied = copy.outputs[0]
            copied.dtype, copied.shape = value.dtype, value.shape
            model.graph.append(copy)
            model.graph.outputs[index] = value = copied
        value.name = OWN + name
        seen.add(value)


def name_by_module(model: ir.Model) -> None:
    """Rename nodes to `module.path/Operator` and their values after them; quantized values take the name of their
    scale.

    What `set_apart` marked keeps the name it had; constants whose names the exporter made up are named after the node
    that reads them.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    values, nodes = Names(), Names()
    invented = {value for value in graph.initializers.values() if INVENTED.fullmatch(str(value.name))}
    for value in dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values()]):
        if value not in invented:
            name = str(value.name).removeprefix(OWN)
            # even to the same name in the end: a renamed initializer goes last, and they keep their order
            _rename(value, OWN)
            _rename(value, values.unique(name))
    for node in graph:
        path = scope(node)
        node.name = nodes.unique(onnx_node(path, node.op_type))
        for index, value in enumerate(node.outputs):
            if value in outputs:
                continue
            label = (_quantized_name(node) if index == 0 else None) or _moved_codes_name(node, value)
            value.name = values.unique(label or onnx_output(node.name, index))
        for index, operand in enumerate(node.inputs):
            if operand is not None and operand in invented:
                invented.remove(operand)
                _rename(operand, values.unique(onnx_input(node.name, _parameter(node, index))))


def name_axes(model: ir.Model, names: Sequence[Mapping[int, str]]) -> None:
    """Call the symbolic axes of the inputs by `names`, one mapping from axis to name per input, and their symbols so
    everywhere.
    """
    graph = model.graph
    symbols = {
        dim.value: wanted[axis]
        for value, wanted in zip(graph.inputs, names)
        if value.shape is not None
        for axis, dim in enumerate(value.shape)
        if isinstance(dim, ir.SymbolicDim) and dim.value and axis in wanted
    }
    values = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    for value in dict.fromkeys(values):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value and value.shape is not None:
                value.shape[axis] = re.sub(
                    r"[A-Za-z_]\w*", lambda symbol: symbols.get(symbol.group(), symbol.group()), dim.value
                )


def scope(node: ir.Node) -> str:
    """Dotted path of the innermost module of a node, '' for the root."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    modules = [s for s in scopes[:-1] if s and not s.startswith(NO_MODULE)]
    return str(modules[-1]) if modules else ""


def _quantized_name(node: ir.Node) -> str | None:
    """`blocks.0.attn.qkv.input_quantized` for the codes that the scale `blocks.0.attn.qkv.input_scale` belongs to."""
    if node.op_type == "Min" and node.inputs[0] is not None:
        producer = node.inputs[0].producer()
        if producer is not None and producer.op_type == "QuantizeLinear":
            return _stem(producer, 1, QUANTIZED)
    if node.op_type == "QuantizeLinear":
        followed = any(use.node.op_type == "Min" for use in node.outputs[0].uses())
        return _stem(node, 1, ROUNDED if followed else QUANTIZED)
    if node.op_type in ("DequantizeLinear", "Log2Softmax", "Log2Quantize"):
        return _stem(node, 1, DEQUANTIZED)
    return None


def _moved_codes_name(node: ir.Node, value: ir.Value) -> str | None:
    """The same for codes that a layout operator hands to their DequantizeLinear, or to the cache that hands them on."""
    if node.op_type in ("QuantizeLinear", "Min"):
        return None
    for use in value.uses():
        if use.node.op_type == "DequantizeLinear" and use.idx == 0:
            return _stem(use.node, 1, QUANTIZED)
        if use.node.op_type == "Concat" and value.dtype == ir.DataType.UINT8:
            return _read_from_cache(use.node.outputs[0])
    return None


def _read_from_cache(value: ir.Value) -> str | None:
    """The name of the codes in a cache: one DequantizeLinear reads them, moved about."""
    pending = [value]
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type == "DequantizeLinear":
                return _stem(use.node, 1, QUANTIZED)
            pending += use.node.outputs
    return None


def _stem(node: ir.Node, index: int, suffix: Suffix) -> str | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    stem = SCALE.stem(str(value.name)) if value is not None and value.is_initializer() else None
    return None if stem is None else suffix.of(stem)


def _parameter(node: ir.Node, index: int) -> str:
    names = PARAMETERS.get(node.op_type, [])
    return names[index] if index < len(names) else f"input_{index}"


def _rename(value: ir.Value, name: str) -> None:
    value.name = name  # the graph's initializer table follows the name
    if value.const_value is not None:
        value.const_value.name = name
