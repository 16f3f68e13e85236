"""Matrices that lie apart from their model: laid out, written, read, and the same inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from compiled import compiled, inputs
from onnx import TensorProto, helper, numpy_helper

from repquant_fx.errors import InputError
from repquant_fx.exporters import apart
from repquant_fx.exporters.apart import GRANULE, LARGE, PAGE, OnnxModel, is_apart, is_data_of, keep_apart, place_of
from repquant_fx.exporters.reading import read_onnx
from repquant_fx.runtime import session


def model_of(*tensors: ir.TensorProtocol) -> ir.Model:
    values = [ir.Value(name=each.name, const_value=each, type=ir.TensorType(each.dtype), shape=ir.Shape(each.shape))
              for each in tensors]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21}), ir_version=10)


def stored(**arrays: np.ndarray) -> OnnxModel:
    model = model_of(*(ir.Tensor(array, name=name) for name, array in arrays.items()))
    files = keep_apart(model)
    return OnnxModel(ir.to_proto(model), files)


def nibbles(shape: tuple[int, ...]) -> np.ndarray:
    import ml_dtypes

    return (np.arange(int(np.prod(shape))) % 16 - 8).reshape(shape).astype(ml_dtypes.int4)


def test_only_matrices_lie_apart_and_as_views() -> None:
    wide, scales = np.ones((32, 32), np.float32), np.ones(5000, np.float32)
    model = stored(wide=wide, small=np.ones((2, 2), np.float32), scales=scales)
    assert [each.name for each in model.proto.graph.initializer if is_apart(each)] == ["wide"]
    (content,) = model.files.values()
    assert np.shares_memory(content, wide) and content.dtype == np.uint8 and content.shape == (4096,)
    assert not np.shares_memory(next(iter(model.owned().files.values())), wide)


@pytest.mark.parametrize("array", [
    np.arange(1024, dtype=np.int8).reshape(4, 4, 64), np.random.default_rng(0).normal(size=(40, 40)).astype(np.float16),
    nibbles((64, 64)), nibbles((51, 43)), np.arange(2048, dtype=np.int32).reshape(64, 32).T])
def test_any_type_comes_back(array: np.ndarray) -> None:
    model = stored(w=array)
    (tensor,) = model.proto.graph.initializer
    assert is_apart(tensor) and np.array_equal(model.array(tensor), array)
    (inside,) = model.inlined().graph.initializer
    assert np.array_equal(numpy_helper.to_array(inside), array) and model.array(inside) is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_inside_is_what_the_exporter_would_write(bits: int) -> None:
    """The size of the one file is known without making it, up to the last length in it."""
    model = compiled("vit", bits).model
    data = model.to_bytes()
    assert len(data) == model.size() and model.files
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert not any(is_apart(tensor) for tensor in onnx.load_from_string(data).graph.initializer)
    assert read_bytes(data).to_bytes() == data


def read_bytes(data: bytes) -> OnnxModel:
    model = ir.from_proto(onnx.load_from_string(data))
    files = keep_apart(model)
    return OnnxModel(ir.to_proto(model), files)


@pytest.mark.parametrize("count", [16, 127, 128, 1 << 14, (1 << 14) + 1, 1 << 21])
def test_sizes_around_the_steps_of_a_length(count: int) -> None:
    model = stored(w=np.ones((8, count), np.int8))
    assert model.size() == len(model.to_bytes())


def test_more_than_protobuf_takes_is_an_error_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored(w=np.ones((64, 64), np.int8))
    monkeypatch.setattr(apart, "LARGEST_FILE", model.size() - 1)
    with pytest.raises(InputError, match="external data"):
        model.to_bytes()
    monkeypatch.setattr(apart, "LARGEST_FILE", model.size())
    assert model.to_bytes()


def test_the_layout_of_the_data_file() -> None:
    """Offsets are those that can be mapped; no stretch touches another; what is between them is zero."""
    arrays = {"a": np.full((33, 32), 1, np.int8), "b": np.full((2, LARGE), 2, np.int8),
              "c": np.full((64, 64), 3, np.int8)}
    model = stored(**arrays)
    data, beside = model.beside("m.onnx")
    ((location, parts),) = beside.items()
    content = b"".join(bytes(part) for part in parts)
    assert len(content) == len(parts) and is_data_of(location, "m.onnx")
    places = {t.name: place_of(t) for t in onnx.load_from_string(data).graph.initializer}
    assert {place["location"] for place in places.values()} == {location}
    starts = {name: int(place["offset"]) for name, place in places.items()}
    assert starts == {"a": 0, "b": GRANULE, "c": GRANULE + 2 * LARGE} and GRANULE % PAGE == 0
    left = bytearray(content)
    for name, array in arrays.items():
        assert content[starts[name]:][:array.nbytes] == array.tobytes()
        left[starts[name]:starts[name] + array.nbytes] = bytes(array.nbytes)
    assert not any(left)


def test_a_data_file_is_named_after_its_content() -> None:
    one, same, other = (next(iter(stored(w=np.full((64, 64), value, np.int8)).beside("m.onnx")[1]))
                        for value in (1, 1, 2))
    assert one == same != other
    assert is_data_of(one, "m.onnx") and not is_data_of(one, "n.onnx") and not is_data_of("m.onnx.data", "m.onnx")


@pytest.mark.parametrize("name", ["n" * 250 + ".onnx", "\N{WAVY DASH}" * 80 + ".onnx", "\udcff\n.onnx", "a:b\\c.onnx"])
def test_odd_names_have_data_files(name: str, tmp_path: Path) -> None:
    data, beside = stored(w=np.ones((64, 64), np.int8)).beside(name)
    ((location, parts),) = beside.items()
    assert is_data_of(location, name) and len(location.encode()) < 255 and location.isprintable()
    (tmp_path / location).write_bytes(b"".join(map(bytes, parts)))
    (tmp_path / "m.onnx").write_bytes(data)
    assert read_onnx(tmp_path / "m.onnx").files.keys() == {location}


def test_a_session_keeps_nothing_of_what_it_was_given() -> None:
    """ONNX Runtime copies: memory that is freed or written afterwards changes nothing."""
    table = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    gather = helper.make_graph([helper.make_node("Gather", ["w", "i"], ["y"])], "g",
                               [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
                               [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
                               initializer=[numpy_helper.from_array(table, "w")])
    proto = helper.make_model(gather, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = read_bytes(proto.SerializeToString()).owned()
    found = session(model)
    for content in model.files.values():
        content[:] = 0
    assert np.array_equal(found.run(None, {"i": np.arange(64)})[0], table)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_beside_and_inside_compute_the_same(bits: int, tmp_path: Path) -> None:
    """In our session, and in one that only knows the path."""
    result = compiled("vit", bits)
    data, beside = result.model.beside("m.onnx")
    (tmp_path / "m.onnx").write_bytes(data)
    for location, parts in beside.items():
        (tmp_path / location).write_bytes(b"".join(map(bytes, parts)))
    x = inputs("vit", 3).numpy()
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    expected = session(result.to_bytes(), threads=1).run(None, {"x": x})[0]
    plain = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert np.array_equal(session(tmp_path / "m.onnx", threads=1).run(None, {"x": x})[0], expected)
    assert np.array_equal(session(result.model, threads=1).run(None, {"x": x})[0], expected)
    assert torch.allclose(torch.from_numpy(plain.run(None, {"x": x})[0]), torch.from_numpy(expected), atol=1e-5)
    file = read_onnx(tmp_path / "m.onnx")
    assert OnnxModel(file.model, file.files).to_bytes() == result.to_bytes() and not file.model.functions[1:]
