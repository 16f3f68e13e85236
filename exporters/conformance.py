"""Does a file hold what its target takes: operators that exist in its opset with these element types, and nothing else?

What is asked of each node is in ONNX's own schemas. An error names the node, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper
from onnx.defs import OpSchema, SchemaError, get_schema

from repquant_fx.errors import InputError, first_line
from repquant_fx.targets import DEFAULT, OPSET, Target

STANDARD = ("", "ai.onnx")


class ConformanceError(InputError):
    """A file holds something that its target does not take."""


def to_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Write a model of opset `OPSET` in another one, in place. Attributes that the other opset lacks go where they say
    nothing; an operator that means something else there is an error, whatever it would compute.

    Raises:
        ConformanceError: an operator, an attribute or a type does not exist there; the message names the node.
    """
    if opset == OPSET:
        return
    for part in (proto.graph, *proto.functions):
        for node in part.node:
            if _foreign(node):
                continue
            present, wanted = get_schema(node.op_type, OPSET), _schema(node, opset)
            if wanted.since_version != present.since_version:
                _translate(node, present, wanted, opset)
    for entry in (*proto.opset_import, *(each for part in proto.functions for each in part.opset_import)):
        if entry.domain in STANDARD:
            entry.version = opset
    proto.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


def check_conformance(proto: onnx.ModelProto, target: Target) -> None:
    """See that every node fits the target and the opset of the file.

    Args:
        proto: a model whose functions are inlined where the target wants them so.

    Raises:
        ConformanceError: one does not; the message names it.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), None)
    if opset is None:
        raise ConformanceError("the file does not say of which opset its operators are")
    foreign = next(filter(_foreign, proto.graph.node), None)
    if foreign is not None and target.inlined:
        raise ConformanceError(f"{_called(foreign)} is of the domain {foreign.domain}: the target {target.name} takes "
                               f"standard operators only; compile with --target {target.name}")
    if opset == OPSET and target.operators is None and not target.refused:
        return  # onnx.checker says the rest
    types = element_types(proto)
    for node in proto.graph.node:
        if _foreign(node):
            continue
        if target.operators is not None and node.op_type not in target.operators:
            raise ConformanceError(f"{_called(node)}: the target {target.name} does not take this operator")
        _check_types(node, _schema(node, opset), types, opset)
    for name, kind in types.items():
        if TensorProto.DataType.Name(kind) in target.refused:
            raise ConformanceError(f"{_reader(proto, name)} works on {TensorProto.DataType.Name(kind)}, which the "
                                   f"target {target.name} does not take; {_advice(target)}")


def element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element types of the values of a graph, as far as they can be told, by name.

    Raises:
        ConformanceError: they contradict each other.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception as error:
        raise ConformanceError(f"the types of the file's values do not fit together: {first_line(error)}") from error
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}
    types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    return types


def _foreign(node: onnx.NodeProto) -> bool:
    return node.domain not in STANDARD


def _schema(node: onnx.NodeProto, opset: int) -> OpSchema:
    try:
        return get_schema(node.op_type, opset)
    except SchemaError:
        pass
    try:
        since = f"; it came with opset {get_schema(node.op_type).since_version}"
    except SchemaError:
        since = ""
    raise ConformanceError(f"{_called(node)} does not exist in opset {opset}{since}; take a later --opset")


def _translate(node: onnx.NodeProto, present: OpSchema, wanted: OpSchema, opset: int) -> None:
    """Drop what the other opset lacks and what says nothing; see that the rest means the same there."""
    for attribute in list(node.attribute):
        if attribute.name in wanted.attributes:
            continue
        default = present.attributes[attribute.name].default_value
        if helper.get_attribute_value(attribute) != _value(default):
            raise ConformanceError(f"{_called(node)} has no attribute {attribute.name} in opset {opset}")
        node.attribute.remove(attribute)
    shared = present.attributes.keys() & wanted.attributes.keys()
    defaults = [[_value(schema.attributes[name].default_value) for name in sorted(shared)]
                for schema in (present, wanted)]
    inputs = [[(value.name.lower(), str(value.option)) for value in schema.inputs] for schema in (present, wanted)]
    used = len(node.input)
    if defaults[0] != defaults[1] or inputs[0][:used] != inputs[1][:used]:
        raise ConformanceError(f"{_called(node)} is another operator in opset {opset}; take opset {OPSET}")


def _value(attribute: onnx.AttributeProto) -> object:
    """Of a default; zero or nothing where there is none."""
    return helper.get_attribute_value(attribute) if attribute.type else 0


def _check_types(node: onnx.NodeProto, schema: OpSchema, types: Mapping[str, int], opset: int) -> None:
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            kind = types.get(name)
            if not name or not kind or not formal:
                continue
            declared = formal[min(index, len(formal) - 1)].type_str
            text = f"tensor({TensorProto.DataType.Name(kind).lower()})"
            if text not in allowed.get(declared, [declared]):
                raise ConformanceError(f"{_called(node)} takes no {text} in opset {opset}{_since(node, text, index)}")


def _since(node: onnx.NodeProto, text: str, index: int) -> str:
    """Which opset brought a type, where a later one has it."""
    for version in range(1, onnx.defs.onnx_opset_version() + 1):
        try:
            schema = get_schema(node.op_type, version)
        except SchemaError:
            continue
        if any(text in constraint.allowed_type_strs for constraint in schema.type_constraints):
            bits = "; or keep codes of up to 4 bits out of the file (more --wbits)" if "int4" in text else ""
            return f"; opset {version} brought it: take a later --opset{bits}"
    return ""


def _reader(proto: onnx.ModelProto, name: str) -> str:
    return next((_called(node) for node in proto.graph.node if name in (*node.output, *node.input)), repr(name))


def _advice(target: Target) -> str:
    return f"leave --container out, or take the target {DEFAULT}"


def _called(node: onnx.NodeProto) -> str:
    return f"the node {node.name!r} ({node.op_type})"
