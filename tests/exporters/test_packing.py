"""Weights of up to four bits: two codes per byte, in raw data, and the same numbers in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from repquant_fx.exporters.packing import pack_weights
from repquant_fx.runtime import session


def model_with(codes: np.ndarray, dtype: int = TensorProto.INT8, readers: int = 1) -> ir.Model:
    """Dequantizes the initializer `w`, `readers` times."""
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.5])
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], [f"y{i}"], name=f"dq{i}") for i in range(readers)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, list(codes.shape)) for i in range(readers)]
    weight = helper.make_tensor("w", dtype, codes.shape, codes.reshape(-1).tolist())
    graph = helper.make_graph(nodes, "g", [], outputs, initializer=[weight, scale])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-8, 8, shape)


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3,), (16,), (1, 1), (3, 5), (4, 6), (5, 1), (2, 3, 2, 2), (7, 3, 1, 1)], ids=str
)
def test_round_trip(shape: tuple[int, ...]) -> None:
    codes = draw(shape)
    model = model_with(codes)
    assert pack_weights(model, {"w"}) == 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    stored = next(t for t in proto.graph.initializer if t.name == "w")
    assert stored.data_type == TensorProto.INT4 and list(stored.dims) == list(shape)
    assert not stored.int32_data, "only raw data is compact"
    assert len(stored.raw_data) == (codes.size + 1) // 2
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int64), codes)
    found = session(proto).run(None, {})[0]
    assert np.array_equal(found, codes * np.float32(0.5))


def test_nibbles_first_code_low() -> None:
    """The bytes themselves, as the ONNX specification lays them down."""
    model = model_with(np.array([-8, 7, 1, -1, 3]))
    pack_weights(model, {"w"})
    stored = next(t for t in ir.to_proto(model).graph.initializer if t.name == "w")
    assert stored.raw_data == bytes([0x78, 0xF1, 0x03])


def test_a_cast_to_int8_stands_before_the_dequantization() -> None:
    """ONNX Runtime fuses INT8, not INT4; the Cast of a constant is folded when a session is created."""
    model = model_with(draw((4, 4)))
    pack_weights(model, {"w"})
    graph = ir.to_proto(model).graph
    assert [n.op_type for n in graph.node] == ["Cast", "DequantizeLinear"]
    cast, dequantize = graph.node
    assert cast.input == ["w"] and cast.output == ["w_int8"] == [dequantize.input[0]] and cast.name == "dq0/unpack"
    assert cast.attribute[0].i == TensorProto.INT8


def test_shared_weights_are_packed_once() -> None:
    codes = draw((3, 3))
    model = model_with(codes, readers=3)
    assert pack_weights(model, {"w"}) == 1
    proto = ir.to_proto(model)
    assert [n.op_type for n in proto.graph.node].count("Cast") == 1
    assert all(n.input[0] == "w_int8" for n in proto.graph.node if n.op_type == "DequantizeLinear")
    for found in session(proto).run(None, {}):
        assert np.array_equal(found, codes * np.float32(0.5))


@pytest.mark.parametrize("code", [-9, 8, 127, -128])
def test_codes_that_do_not_fit_stay_int8(code: int) -> None:
    codes = draw((2, 3))
    codes[1, 2] = code
    model = model_with(codes)
    assert pack_weights(model, {"w"}) == 0
    assert next(t for t in ir.to_proto(model).graph.initializer if t.name == "w").data_type == TensorProto.INT8
    assert np.array_equal(session(ir.to_proto(model)).run(None, {})[0], codes * np.float32(0.5))


def test_only_what_is_named_and_int8() -> None:
    model = model_with(draw((2, 2)))
    assert pack_weights(model, {"s", "absent"}) == 0  # a float, and nothing
    assert pack_weights(model, set()) == 0
    assert pack_weights(model_with(draw((2, 2)), TensorProto.INT32), {"w"}) == 0
    assert len(ir.to_proto(model).graph.node) == 1


def test_half_the_size() -> None:
    codes = draw((64, 64))
    model = model_with(codes)
    before = ir.to_proto(model).ByteSize()
    pack_weights(model, {"w"})
    saved = before - ir.to_proto(model).ByteSize()
    assert saved > 64 * 64 // 2 - 200
