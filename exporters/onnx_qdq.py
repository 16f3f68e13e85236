"""Write a lowered graph as ONNX QDQ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import InputError, RepQuantError
from repquant_fx.exporters import functions
from repquant_fx.exporters.apart import OnnxModel, keep_apart
from repquant_fx.exporters.conformance import check_conformance, to_opset
from repquant_fx.exporters.inlining import inline_functions
from repquant_fx.exporters.naming import name_axes, name_by_module, separate_outputs, set_apart
from repquant_fx.exporters.narrow_codes import narrow_codes
from repquant_fx.exporters.packing import PACKED_BITS, pack_weights
from repquant_fx.exporters.signed_codes import sign_codes
from repquant_fx.exporters.simplify import simplify
from repquant_fx.exporters.translations import translation_table
from repquant_fx.exporters.zero_points import add_zero_points
from repquant_fx.frontends.capture import AXES, distinct, quiet_torch
from repquant_fx.passes.base import aten, attribute, copy_meta
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.targets import Target, find
from repquant_fx.torch_private import quick_translation

OPSET = functions.OPSET
LOCAL_FUNCTIONS = {"Log2Softmax": functions.log2_softmax, "Log2Quantize": functions.log2_quantize}


class ExportError(RepQuantError):
    """The lowered graph cannot be written as ONNX."""


class UnwritableError(InputError, ExportError):
    """The model computes something that has no counterpart in ONNX."""


def export_onnx(
    graph_module: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: object = None,
    metadata: Mapping[str, str] | None = None,
    container: str = "int8",
    target: Target | None = None,
) -> OnnxModel:
    """An ONNX model that computes what the lowered graph computes.

    Args:
        graph_module: after `LowerToQDQ`.
        example_inputs: positional, batch at least 2 where the batch is dynamic.
        dynamic_shapes: as for torch.export.
        metadata: written into the model's metadata_props.
        container: `int8`, or `int4` for UINT4 and INT4 Q/DQ up to 4 bits (see `exporters.narrow_codes`).
        target: for whom: its opset, functions kept or inlined, and what it takes; the default one where None.

    Returns:
        a model that passes `onnx.checker` in full mode, its matrices apart from it: views of the graph's tensors where
        the file holds them as they are. The same graph gives the same bytes.

    Raises:
        UnwritableError: an operator has no ONNX counterpart (named).
        ConformanceError: the target or its opset does not take an operator or a type (named).
        ExportError: torch cannot export the lowered graph, or the checker refuses the result.
    """
    target = target or find()
    copy_outputs(graph_module)
    packed, alone = narrow_weights(graph_module), weights_alone(graph_module)
    model = translate(graph_module, example_inputs, input_names, output_names, dynamic_shapes)
    set_apart(model)
    simplify(model)
    separate_outputs(model, output_names)
    name_by_module(model)
    name_axes(model, [node.meta.get(AXES, {}) for node in graph_module.graph.find_nodes(op="placeholder")])
    add_zero_points(model)
    functions.set_thresholds(model)
    pack_weights(model, packed, alone)
    if container == "int4" or not target.flat:
        (narrow_codes if container == "int4" else sign_codes)(model)
        common.RemoveUnusedNodesPass()(model)
    if target.inlined:
        inline_functions(model)
    else:
        _add_functions(model)
    _strip(model)
    common.TopologicalSortPass()(model)
    files = keep_apart(model)
    proto = ir.to_proto(model)
    proto.producer_name, proto.graph.name = "repquant-fx", "main"
    onnx.helper.set_model_props(proto, dict(sorted((metadata or {}).items())))
    to_opset(proto, target.opset)
    check_conformance(proto, target)
    return _checked(OnnxModel(proto, files))


def _checked(model: OnnxModel) -> OnnxModel:
    try:
        onnx.checker.check_model(model.declared(), full_check=True)
    except Exception as error:
        raise ExportError(f"onnx.checker refuses the exported model: {str(error).splitlines()[0]}") from error
    return model


def _add_functions(model: ir.Model) -> None:
    """Put the functions that are called into the file."""
    used = {node.op_type for node in model.graph if node.domain == functions.DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(LOCAL_FUNCTIONS[name]())
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[functions.DOMAIN] = functions.VERSION


def copy_outputs(graph_module: GraphModule) -> None:
    """Outputs that are inputs or constants become copies: a file has one name a value."""
    output = graph_module.graph.output_node()
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    copies = {}
    for result in results:
        if isinstance(result, Node) and result.op in ("placeholder", "get_attr") and result not in copies:
            with graph_module.graph.inserting_before(output):
                copy = graph_module.graph.call_function(aten.clone.default, (result,))
            copies[result] = copy_meta(result, copy, result.meta.get("val"))
    if copies:
        output.args = torch.fx.map_arg(output.args, lambda node: copies.get(node, node))
        graph_module.recompile()


def narrow_weights(graph_module: GraphModule) -> set[str]:
    """Names of the constants that hold codes of at most 4 bits."""
    names = set()
    for node in graph_module.graph.nodes:
        if node.target is DEQUANTIZE and node.args[3] <= PACKED_BITS and node.args[0].op == "get_attr":
            if attribute(graph_module, node.args[0]).dtype is torch.int8 and not _multiplies_float(node):
                names.add(str(node.args[0].target))
    return names


def weights_alone(graph_module: GraphModule) -> set[str]:
    """Names of the constants that hold codes, or zero points, of at most 4 bits of weights whose activations are in
    float: a runtime multiplies by them as they are packed.
    """
    read = (node for node in graph_module.graph.nodes if node.target is DEQUANTIZE and node.args[3] <= PACKED_BITS)
    return {str(constant.target) for node in read if _multiplies_float(node)
            for constant in (node.args[0], node.args[2]) if isinstance(constant, Node)}


def _multiplies_float(weight: Node) -> bool:
    """Whether a dequantized weight is the right operand of a MatMul; beside integers it is a Linear's."""
    return weight.args[0].op == "get_attr" and all(  # type: ignore[union-attr]
        user.target is aten.matmul.default and user.args[1] is weight for user in weight.users)


def translate(
    graph_module: GraphModule,
    example_inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: object,
) -> ir.Model:
    """A graph as torch's exporter writes it; see `export_onnx`.

    Raises:
        UnwritableError: an operator has no ONNX counterpart (named).
        ExportError: torch cannot export it.
    """
    inputs = distinct(example_inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad(), quiet_torch():
            warnings.simplefilter("ignore")
            exported = torch.export.export(graph_module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
            try:
                with quick_translation():
                    program = torch.onnx.export(exported, (), dynamo=True, opset_version=OPSET, optimize=False,
                                                verbose=False, custom_translation_table=translation_table(),
                                                input_names=list(input_names), output_names=list(output_names))
            except Exception as error:
                raise UnwritableError(f"the model computes what cannot be written as ONNX: {_reason(error)}") from error
    except UnwritableError:
        raise
    except Exception as error:
        raise ExportError(f"cannot write the graph as ONNX: {_reason(error)}") from error
    assert program is not None
    return program.model


def _strip(model: ir.Model) -> None:
    """Drop the exporter's own notes: they hold stack traces and file paths, which differ between machines."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _reason(error: BaseException) -> str:
    """The innermost cause, which names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
