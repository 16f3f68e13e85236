"""Simplification: the same numbers from fewer operators; quantizers and weights are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from repquant_fx.exporters.simplify import infer_reshapes, simplify
from repquant_fx.runtime import session

F, I64 = TensorProto.FLOAT, TensorProto.INT64


def ints(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, I64, [len(values)], values)


def model(
    nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], inputs: list[object], outputs: list[object]
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", F, inputs)],
                              [helper.make_tensor_value_info("y", F, outputs)], initializer=initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def batch_size() -> list[onnx.NodeProto]:
    """The size of x's first axis as torch's exporter writes it: a scalar that becomes a list of one."""
    return [
        helper.make_node("Shape", ["x"], ["sizes"], start=0, end=1),
        helper.make_node("Squeeze", ["sizes"], ["number"]),
        helper.make_node("Reshape", ["number", "one"], ["batch"]),
    ]


def reshaped(*sizes: object) -> onnx.ModelProto:
    """x (N, 3, 8) reshaped to a Concat of `sizes`; None stands for the batch, computed from x."""
    nodes, constants, parts = batch_size(), [ints("one", -1)], []
    for i, size in enumerate(sizes):
        if size is None:
            parts.append("batch")
        else:
            constants.append(ints(f"size_{i}", int(str(size))))
            parts.append(f"size_{i}")
    nodes += [helper.make_node("Concat", parts, ["shape"], axis=0), helper.make_node("Reshape", ["x", "shape"], ["y"])]
    return model(nodes, constants, ["N", 3, 8], [None] * len(sizes))


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(proto)
    simplify(graph)
    result = ir.to_proto(graph)
    onnx.checker.check_model(result, full_check=True)
    return result


def same(before: onnx.ModelProto, after: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        expected, found = (session(p, threads=1).run(None, {"x": x})[0] for p in (before, after))
        assert expected.shape == found.shape and np.array_equal(expected, found)


@pytest.mark.parametrize("sizes", [(None, 24), (None, 3, 2, 4), (4, None, 6), (24, None)], ids=str)
def test_one_computed_size_is_inferred(sizes: tuple[object, ...]) -> None:
    before = reshaped(*sizes)
    after = simplified(before)
    assert [n.op_type for n in after.graph.node] == ["Reshape"]
    shape = next(t for t in after.graph.initializer if t.name == after.graph.node[0].input[1])
    assert numpy_helper.to_array(shape).tolist() == [-1 if s is None else s for s in sizes]
    same(before, after, (1, 3, 8), (2, 3, 8), (5, 3, 8))


@pytest.mark.parametrize("sizes", [(None, -1), (None, 0, 8), (None, None, 24)], ids=str)
def test_what_inference_would_make_ambiguous_is_left(sizes: tuple[object, ...]) -> None:
    """A second -1, a 0 (which copies a size), or two computed sizes."""
    graph = ir.from_proto(reshaped(*sizes))
    assert infer_reshapes(graph.graph) == 0
    assert "Concat" in [n.op_type for n in graph.graph]


def test_a_computed_size_of_several_numbers_is_left() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], start=0, end=2),
        helper.make_node("Concat", ["sizes", "last"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    proto = model(nodes, [ints("last", 8)], ["N", "M", 8], [None, None, 8])
    graph = ir.from_proto(proto)
    assert infer_reshapes(graph.graph) == 0
    same(proto, simplified(proto), (2, 3, 8), (1, 5, 8))


def test_each_reshape_gets_its_own_sizes() -> None:
    nodes = [
        *batch_size(),
        helper.make_node("Concat", ["batch", "a"], ["s1"], axis=0),
        helper.make_node("Reshape", ["x", "s1"], ["r"]),
        helper.make_node("Concat", ["batch", "b", "c"], ["s2"], axis=0),
        helper.make_node("Reshape", ["r", "s2"], ["y"]),
    ]
    before = model(nodes, [ints("one", -1), ints("a", 24), ints("b", 6), ints("c", 4)], ["N", 3, 8], [None, 6, 4])
    after = simplified(before)
    assert [n.op_type for n in after.graph.node] == ["Reshape", "Reshape"]
    same(before, after, (1, 3, 8), (4, 3, 8))


def quantized() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.integers(-8, 8, (4, 8)).astype(np.int8), "w"),
                 numpy_helper.from_array(rng.random(4).astype(np.float32) + 0.1, "w_scale"),
                 helper.make_tensor("s", F, [], [0.1]), helper.make_tensor("z", TensorProto.UINT8, [], [7]),
                 helper.make_tensor("top", TensorProto.UINT8, [], [15])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Min", ["q", "top"], ["m"]),
        helper.make_node("DequantizeLinear", ["m", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["v"], axis=0),
        helper.make_node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    return model(nodes, constants, ["N", 8], ["N", 4])


def test_quantizers_and_weights_stay() -> None:
    """Folding DequantizeLinear(weight) would write float weights."""
    before = quantized()
    after = simplified(before)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    kinds = {t.name: t.data_type for t in after.graph.initializer}
    assert kinds == {t.name: t.data_type for t in before.graph.initializer}
    same(before, after, (1, 8), (3, 8))


def test_clean_up() -> None:
    """Constants are folded and lifted, identities, duplicates and dead ends go."""
    nodes = [helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", F, [], [2.0])),
             helper.make_node("Constant", [], ["three"], value=helper.make_tensor("t", F, [], [3.0])),
             helper.make_node("Mul", ["two", "three"], ["six"]), helper.make_node("Identity", ["x"], ["i"]),
             helper.make_node("Mul", ["i", "six"], ["a"]), helper.make_node("Mul", ["x", "six"], ["b"]),
             helper.make_node("Relu", ["x"], ["dead"]), helper.make_node("Add", ["a", "b"], ["y"])]
    before = model(nodes, [], ["N", 4], ["N", 4])
    after = simplified(before)
    assert [n.op_type for n in after.graph.node] == ["Mul", "Add"]
    assert [float(numpy_helper.to_array(t)) for t in after.graph.initializer] == [6.0]
    same(before, after, (2, 4))
