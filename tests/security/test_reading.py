"""An ONNX file that is not trusted is screened before anything in it is followed; what was screened is what runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiled import compiled
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from repquant_fx.cli import main
from repquant_fx.errors import ModelFileError
from repquant_fx.exporters import reading
from repquant_fx.exporters.reading import parse_onnx, read_onnx
from repquant_fx.runtime import session

VALUE = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]


def graph(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> GraphProto:
    return helper.make_graph(list(nodes), "g", VALUE[:1], VALUE[1:], initializer=list(tensors))


def model(
    *nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = (), functions: tuple[FunctionProto, ...] = ()
) -> ModelProto:
    return helper.make_model(
        graph(*nodes, tensors=tensors), opset_imports=OPSETS, functions=list(functions), ir_version=10
    )


def call(name: str, source: str, target: str) -> onnx.NodeProto:
    return helper.make_node(
        name, [source], [target], domain="f" if name.startswith("F") else "", name=f"{name}_{target}"
    )


def function(name: str, *nodes: onnx.NodeProto) -> FunctionProto:
    return helper.make_function("f", name, ["x"], ["y"], list(nodes), OPSETS)


def doubling(levels: int) -> ModelProto:
    made = [function("F0", call("Relu", "x", "y"))]
    made += [function(f"F{k}", call(f"F{k - 1}", "x", "m"), call(f"F{k - 1}", "m", "y")) for k in range(1, levels + 1)]
    return model(call(f"F{levels}", "x", "y"), functions=tuple(made))


def external(tensor: TensorProto) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    return tensor


def changed(name: str = "w", **fields: object) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones((2, 2), np.float32), name)
    for key, value in fields.items():
        if key == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)  # type: ignore[arg-type]
        else:
            setattr(tensor, key, value)
    return tensor


def branch(inside: onnx.NodeProto) -> ModelProto:
    body = helper.make_graph([inside], "b", [], VALUE[1:])
    condition = numpy_helper.from_array(np.array(True), "c")
    return model(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body), tensors=(condition,))


HOSTILE: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "doubling": (lambda: doubling(25), "expand to 33554432 nodes"),
    "less doubling": (lambda: doubling(15), "expand to 32768 nodes"),  # ONNX Runtime takes half a minute
    "chain": (lambda: doubling(200), "more than 32 levels deep"),
    "recursion": (
        lambda: model(call("F0", "x", "y"), functions=(function("F0", call("F0", "x", "y")),)),
        "'F0' calls itself",
    ),
    "mutual": (
        lambda: model(
            call("F0", "x", "y"), functions=(function("F0", call("F1", "x", "y")), function("F1", call("F0", "x", "y")))
        ),
        "calls itself",
    ),
    "external": (
        lambda: model(call("Relu", "x", "y"), tensors=(external(changed()),)),
        "'w' keeps its data in another file",
    ),
    "external, unsaid": (
        lambda: model(call("Relu", "x", "y"), tensors=(_named(changed()),)),
        "'w' keeps its data in another file",
    ),
    "external in a constant": (
        lambda: branch(helper.make_node("Constant", [], ["y"], value=external(changed()))),
        "in another file",
    ),
    "external in a function": (
        lambda: model(
            call("F0", "x", "y"),
            functions=(function("F0", helper.make_node("Constant", [], ["y"], value=external(changed()))),),
        ),
        "in another file",
    ),
    "short": (
        lambda: model(call("Relu", "x", "y"), tensors=(changed(raw_data=b"\0" * 15),)),
        "'w' of shape \\[2, 2\\] holds 15",
    ),
    "huge": (lambda: model(call("Relu", "x", "y"), tensors=(changed(dims=[1 << 40, 1 << 40]),)), "holds 16"),
    "negative": (lambda: model(call("Relu", "x", "y"), tensors=(changed(dims=[-2, -2]),)), "negative size"),
    "no type": (lambda: model(call("Relu", "x", "y"), tensors=(changed(data_type=99),)), "unknown type 99"),
    "circle": (lambda: model(call("Relu", "y", "m"), call("Relu", "m", "y")), "comes later"),
    "itself": (lambda: model(call("Identity", "y", "y")), "comes later"),
    "escape": (
        lambda: model(helper.make_node("Relu", ["x"], ["y"], name="a\x1b[2J\nb")),
        r"a\\x1b\[2J\\nb, which is no printable text",
    ),
}


def _named(tensor: TensorProto) -> TensorProto:
    tensor.external_data.add(key="location", value="secret")
    return tensor


@pytest.mark.parametrize("kind", HOSTILE)
def test_refused_by_name_wherever_a_file_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = HOSTILE[kind]
    (tmp_path / "secret").write_bytes(b"SECRETSECRETSECR")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(make().SerializeToString())
    for read in (read_onnx, session):
        with pytest.raises(ModelFileError, match=words):
            read("m.onnx")
    for command in (["inspect", "m.onnx"], ["evaluate", "m.onnx", "data"], ["recipe", "show", "m.onnx"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.removesuffix("\n").isprintable() and "SECRET" not in err


def test_a_graph_without_functions_may_be_long() -> None:
    chain = [call("Relu", f"v{k}" if k else "x", f"v{k + 1}") for k in range(30_000)]
    parse_onnx(model(*chain, call("Relu", "v30000", "y")).SerializeToString(), "m")


@pytest.mark.parametrize("levels", [0, 5])
def test_honest_functions_run(levels: int) -> None:
    proto = doubling(levels)
    assert parse_onnx(proto.SerializeToString(), "m") == proto
    assert session(proto).run(None, {"x": -np.ones((1, 2), np.float32)})[0].max() == 0


@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 3), np.float64),
        np.array(3, np.int8),
        np.ones((0, 3), np.float32),
        np.ones(3, np.complex64),
        np.array([True]),
        np.array(["a", "b"], object),
        np.ones(3, np.float16),
    ],
)
def test_honest_tensors(array: np.ndarray) -> None:
    tensors = [numpy_helper.from_array(array, "w")]
    if array.dtype != object:
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensors.append(helper.make_tensor("v", dtype, array.shape, array.flatten().tolist()))
    parse_onnx(model(call("Relu", "x", "y"), tensors=tuple(tensors)).SerializeToString(), "m")


@pytest.mark.parametrize("dtype", [TensorProto.UINT4, TensorProto.INT4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_honest_tensors_of_four_bits(dtype: int, count: int) -> None:
    typed = helper.make_tensor("w", dtype, [count], [1] * count)
    raw = TensorProto(name="v", data_type=dtype, dims=[count], raw_data=b"\x11" * ((count + 1) // 2))
    parse_onnx(model(call("Relu", "x", "y"), tensors=(typed, raw)).SerializeToString(), "m")


def test_a_subgraph_reads_what_stands_around_it() -> None:
    parse_onnx(branch(call("Relu", "x", "y")).SerializeToString(), "m")


def test_a_file_that_is_all_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_FIELDS", 20_000)
    assert parse_onnx(compiled("vit", 4).to_bytes(), "m").graph.node
    with pytest.raises(ModelFileError, match="more than 20000 names and messages"):
        parse_onnx(ModelProto(graph=GraphProto(node=[onnx.NodeProto()] * 30_000)).SerializeToString(), "m")


NOISE = np.random.default_rng(0).bytes(200)


@pytest.mark.parametrize("data", [b"", b"noise", b"\xff" * 30, b"\x3a\x00", b"\x3b\x3c", NOISE])
def test_no_model(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="m is not an ONNX model"):
        parse_onnx(data, "m")


def test_names_that_are_no_text() -> None:
    data = (
        model(helper.make_node("Relu", ["x"], ["y"], name="nodename"))
        .SerializeToString()
        .replace(b"nodename", b"\xed\xa0\x80name1")
    )
    with pytest.raises(ModelFileError, match="a node has the name"):
        parse_onnx(data, "m")


def test_what_was_screened_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes after it was read."""
    path, screened = tmp_path / "m.onnx", compiled("vit", 4).to_bytes()
    path.write_bytes(screened)
    given: list[object] = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda data, *_, **__: given.append(data))
    session(path)
    assert given == [screened]


def test_a_file_whose_name_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff\n.onnx")
    Path(os.fsdecode(path)).write_bytes(compiled("vit", 4).to_bytes())
    page = tmp_path / "p.html"
    assert main(["inspect", os.fsdecode(path), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert r"\udcff\n.onnx: W4A4" in out and page.read_bytes().decode()
