"""Names: after modules, each once, parameters as they were called."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from repquant_fx.exporters.naming import OWN, SCOPES, name_by_module, scope, set_apart
from repquant_fx.naming import Names

F = TensorProto.FLOAT


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, F, ["N", 4])


def build(
    nodes: list[tuple[str, list[str], list[str], str]], initializers: list[onnx.TensorProto], output: str
) -> ir.Model:
    """`nodes`: (operator, inputs, outputs, module path). Initializers called `val_...` are the exporter's."""
    protos = [helper.make_node(kind, ins, outs, name=f"node_{i}") for i, (kind, ins, outs, _) in enumerate(nodes)]
    graph = helper.make_graph(protos, "g", [value("x")], [value(output)], initializer=initializers)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    set_apart(model)
    for constant in [v for v in model.graph.initializers.values() if str(v.name).startswith(f"{OWN}val_")]:
        constant.name = str(constant.name).removeprefix(OWN)
    for node, (_, _, _, path) in zip(model.graph, nodes):
        parts = path.split(".") if path else []
        scopes = ["", *(".".join(parts[:i + 1]) for i in range(len(parts))), "fx_node"]
        node.metadata_props[SCOPES] = repr(scopes)
    return model


def scalar(name: str, number: float = 1.0, kind: int = F) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, [], [number])


def test_nodes_are_named_after_their_module() -> None:
    model = build(
        [
            ("Relu", ["x"], ["val_0"], "a.b"),
            ("Relu", ["val_0"], ["val_1"], "a.b"),
            ("Tanh", ["val_1"], ["val_2"], "a"),
            ("Neg", ["val_2"], ["y"], ""),
        ],
        [],
        "y",
    )
    name_by_module(model)
    proto = ir.to_proto(model)
    assert [n.name for n in proto.graph.node] == ["a.b/Relu", "a.b/Relu_2", "a/Tanh", "Neg"]
    assert [list(n.output) for n in proto.graph.node] == [["a.b/Relu"], ["a.b/Relu_2"], ["a/Tanh"], ["y"]]
    assert [i.name for i in proto.graph.input] == ["x"]
    onnx.checker.check_model(proto, full_check=True)


def test_further_outputs_are_numbered() -> None:
    model = build([("Split", ["x"], ["p", "q"], "mix"), ("Add", ["p", "q"], ["y"], "mix")], [], "y")
    name_by_module(model)
    assert [o.name for o in next(iter(model.graph)).outputs] == ["mix/Split", "mix/Split:1"]


def test_quantized_values_are_named_after_their_scale() -> None:
    constants = [
        scalar("fc.input_scale"),
        scalar("fc.input_zero_point", 3, TensorProto.UINT8),
        scalar("val_7", 15, TensorProto.UINT8),
    ]
    model = build([("QuantizeLinear", ["x", "fc.input_scale", "fc.input_zero_point"], ["a"], "fc"),
                   ("Min", ["a", "val_7"], ["b"], "fc"),
                   ("DequantizeLinear", ["b", "fc.input_scale", "fc.input_zero_point"], ["c"], "fc"),
                   ("QuantizeLinear", ["c", "fc.input_scale", "fc.input_zero_point"], ["d"], "fc"),
                   ("DequantizeLinear", ["d", "fc.input_scale", "fc.input_zero_point"], ["y"], "fc")], constants, "y")
    name_by_module(model)
    outputs = [n.outputs[0].name for n in model.graph]
    # saturated by Min: `rounded` first; without a Min the codes are final. A name that is taken gets a number.
    assert outputs == ["fc.input_rounded", "fc.input_quantized", "fc.input_dequantized", "fc.input_quantized_2", "y"]
    assert "fc/Min.top" in model.graph.initializers and "val_7" not in model.graph.initializers
    assert "fc.input_scale" in model.graph.initializers


def test_invented_initializers_are_named_after_their_reader_and_others_stay() -> None:
    shape = helper.make_tensor("val_3", TensorProto.INT64, [2], [-1, 4])
    weight = helper.make_tensor("layer.weight", F, [4], [1.0] * 4)
    model = build([("Reshape", ["x", "val_3"], ["r"], "layer"), ("Mul", ["r", "layer.weight"], ["m"], "layer"),
                   ("Add", ["m", "val_9"], ["y"], "layer")], [shape, weight, scalar("val_9")], "y")
    name_by_module(model)
    assert set(model.graph.initializers) == {"layer/Reshape.shape", "layer.weight", "layer/Add.input_1"}
    proto = ir.to_proto(model)
    assert {t.name for t in proto.graph.initializer} == set(model.graph.initializers), "the tensors follow the values"
    onnx.checker.check_model(proto, full_check=True)


def test_a_shared_constant_is_renamed_once() -> None:
    model = build([("Add", ["x", "val_1"], ["a"], "p"), ("Add", ["a", "val_1"], ["y"], "q")], [scalar("val_1")], "y")
    name_by_module(model)
    assert set(model.graph.initializers) == {"p/Add.input_1"}


def test_names_do_not_collide_with_parameters_or_inputs() -> None:
    """A module called like another node's value, a parameter that looks like a node's name."""
    model = build(
        [("Relu", ["x"], ["a"], "x"), ("Add", ["a", "m/Add"], ["b"], "m"), ("Add", ["b", "m/Add"], ["y"], "m")],
        [scalar("m/Add")],
        "y",
    )
    name_by_module(model)
    proto = ir.to_proto(model)
    values = (
        [o for n in proto.graph.node for o in n.output]
        + [t.name for t in proto.graph.initializer]
        + [i.name for i in proto.graph.input]
    )
    assert len(set(values)) == len(values)
    assert {t.name for t in proto.graph.initializer} == {"m/Add"}
    onnx.checker.check_model(proto, full_check=True)


def test_unique_names_for_hostile_orders() -> None:
    names = Names()
    given = [names.unique(n) for n in ("a", "a_2", "a", "a", "a_2", "a_3", "a_2_2")]
    assert len(set(given)) == len(given) and given[:2] == ["a", "a_2"]


@pytest.mark.parametrize(
    "text, path",
    [
        ("['', 'blocks.0', 'blocks.0.attn', 'softmax']", "blocks.0.attn"),
        ("['', 'node']", ""),
        ("['only']", ""),
        ("[]", ""),
        ("['', 'a', '_empty_nn_module_stack_from_metadata_hook', 'node']", "a"),
        ("not a list", ""),
        ("['', 'a', ''", ""),
    ],
)
def test_scope(text: str, path: str) -> None:
    node = ir.Node("", "Relu", [None])
    node.metadata_props[SCOPES] = text
    assert scope(node) == path
    assert scope(ir.Node("", "Relu", [None])) == ""
