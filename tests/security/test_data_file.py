"""The data file beside a model: one plain file in its folder, judged before anything is read of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiled import compiled
from onnx import ModelProto, TensorProto

from repquant_fx.audit import audit
from repquant_fx.cli import main
from repquant_fx.errors import ModelFileError
from repquant_fx.exporters import reading
from repquant_fx.exporters.reading import parse_onnx, read_onnx
from repquant_fx.file_check import check_file
from repquant_fx.runtime import session


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `m.onnx` and its data, and `data`; a secret beside the folder."""
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"SECRET" * 10_000)
    data, beside = compiled("vit", 4).model.beside("m.onnx")
    (folder / "m.onnx").write_bytes(data)
    for name, parts in beside.items():
        (folder / name).write_bytes(b"".join(map(bytes, parts)))
    monkeypatch.chdir(folder)
    return folder


def data_of(folder: Path) -> Path:
    return next(folder.glob("m.onnx.*.data"))


def matrices(proto: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in proto.graph.initializer if tensor.external_data]


def edit(folder: Path, change: Callable[[ModelProto], object]) -> None:
    proto = onnx.load(str(folder / "m.onnx"), load_external_data=False)
    change(proto)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())


def says(key: str, value: str, which: int = 0) -> Callable[[Path], None]:
    """One matrix says something else of its place; all of them where it is about the file."""
    def change(proto: ModelProto) -> None:
        for tensor in matrices(proto) if key == "location" else matrices(proto)[which:which + 1]:
            next(entry for entry in tensor.external_data if entry.key == key).value = value

    return lambda folder: edit(folder, change)


def first(change: Callable[[TensorProto], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda proto: change(matrices(proto)[0]))


def link(target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = data_of(folder)
        path.rename(folder / "moved")
        path.symlink_to(target)
    return make


def pipe(folder: Path) -> None:
    path = data_of(folder)
    path.unlink()
    os.mkfifo(path)


def two_files(folder: Path) -> None:
    (folder / "other").write_bytes(data_of(folder).read_bytes())
    first(lambda t: setattr(t.external_data[0], "value", "other"))(folder)


def folder_instead(folder: Path) -> None:
    path = data_of(folder)
    path.unlink()
    path.mkdir()


def overlapping(folder: Path) -> None:
    def change(proto: ModelProto) -> None:
        start = next(e.value for e in matrices(proto)[0].external_data if e.key == "offset")
        next(e for e in matrices(proto)[1].external_data if e.key == "offset").value = str(int(start) + 1)
    edit(folder, change)


def many_times(folder: Path) -> None:
    """A thousand large tensors of the same bytes."""
    def change(proto: ModelProto) -> None:
        for index in range(1000):
            copy = proto.graph.initializer.add()
            copy.CopyFrom(matrices(proto)[0])
            copy.name = f"copy{index}"
    edit(folder, change)


def in_an_attribute(folder: Path) -> None:
    def change(proto: ModelProto) -> None:
        node = onnx.helper.make_node("Constant", [], ["c"], value=matrices(proto)[0])
        proto.graph.node.insert(0, node)
    edit(folder, change)


def in_a_branch(folder: Path) -> None:
    def change(proto: ModelProto) -> None:
        body = onnx.helper.make_graph([], "b", [], [], initializer=[matrices(proto)[0]])
        node = onnx.helper.make_node("If", ["no"], ["c"], then_branch=body, else_branch=body)
        proto.graph.node.append(node)
    edit(folder, change)


def in_a_sparse_tensor(folder: Path) -> None:
    def change(proto: ModelProto) -> None:
        proto.graph.sparse_initializer.add().values.CopyFrom(matrices(proto)[0])
    edit(folder, change)


def vector(tensor: TensorProto) -> None:
    count = int(np.prod(tensor.dims))
    del tensor.dims[:]
    tensor.dims.append(count)


def grown(tensor: TensorProto) -> None:
    tensor.dims[0] *= 1 << 40


def sparse_and_huge(folder: Path) -> None:
    """More than this machine has, of a file that takes no room on the disk."""
    with open(data_of(folder), "r+b") as file:
        file.truncate(1 << 43)

    def change(tensor: TensorProto) -> None:
        tensor.data_type = TensorProto.INT8
        tensor.dims[:] = [1 << 21, 1 << 21]
        for entry in tensor.external_data:
            entry.value = {"length": str(1 << 42), "offset": str(1 << 42)}.get(entry.key, entry.value)
    first(change)(folder)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "above": (says("location", "../secret"), "no name of a file beside the model"),
    "absolute": (says("location", "/etc/passwd"), "no name of a file"),
    "in a folder": (says("location", "data/x"), "no name of a file"),
    "windows": (says("location", "..\\secret"), "no name of a file"),
    "drive": (says("location", "c:secret"), "no name of a file"),
    "dots": (says("location", ".."), "no name of a file"),
    "dot": (says("location", "."), "no name of a file"),
    "empty": (says("location", ""), "no name of a file"),
    "null": (says("location", "a\0b"), "no name of a file"),
    "escape": (says("location", "a\x1b[2J"), r"'a\\x1b\[2J'"),
    "long": (says("location", "a" * 300), "no name of a file"),
    "folder": (says("location", "data"), "cannot read|no plain file"),
    "itself": (says("location", "m.onnx"), "in itself"),
    "absent": (says("location", "absent"), "no such file"),
    "deleted": (lambda folder: data_of(folder).unlink(), "no such file"),
    "link out": (link("../secret"), "a link"),
    "link within": (link("moved"), "a link"),
    "link to a device": (link("/dev/zero"), "a link"),
    "pipe": (pipe, "no plain file"),
    "a folder of its name": (folder_instead, "cannot read|no plain file"),
    "two files": (two_files, "in 2 files"),
    "cut": (lambda folder: os.truncate(data_of(folder), 5000), "has 5000 bytes, but the tensor"),
    "beyond": (says("offset", str(1 << 40)), "but the tensor"),
    "far beyond": (says("offset", "9" * 18), "but the tensor"),
    "beyond numbers": (says("offset", "9" * 30), "no number of bytes"),
    "negative": (says("offset", "-4096"), "no number of bytes"),
    "other digits": (says("offset", "\N{ARABIC-INDIC DIGIT ONE}"), "no number of bytes"),
    "hexadecimal": (says("offset", "0x0"), "no number of bytes"),
    "no offset": (says("offset", ""), "no number of bytes"),
    "long length": (says("length", "99999"), "takes 99999 bytes of another file, not"),
    "short length": (says("length", "1"), "takes 1 bytes of another file, not"),
    "no length": (first(lambda t: t.external_data.pop()), "does not say where"),
    "said twice": (first(lambda t: t.external_data.add(key="location", value="x")), "does not say where"),
    "says more": (first(lambda t: t.external_data.add(key="checksum", value="x")), "does not say where"),
    "unsaid": (first(lambda t: t.ClearField("data_location")), "does not say where"),
    "with data": (first(lambda t: setattr(t, "raw_data", b"1")), "data of its own"),
    "with numbers": (first(lambda t: t.int32_data.append(1)), "data of its own"),
    "text": (first(lambda t: setattr(t, "data_type", TensorProto.STRING)), "no matrix of numbers"),
    "unknown type": (first(lambda t: setattr(t, "data_type", 99)), "unknown type 99"),
    "vector": (first(vector), "no matrix of numbers"),
    "grown": (first(grown), "bytes of another file, not"),
    "huge": (sparse_and_huge, "and this machine has"),
    "overlap": (overlapping, "overlap in m.onnx"),
    "many times": (many_times, "overlap in m.onnx"),
    "in an attribute": (in_an_attribute, "only matrices that are initializers"),
    "in a branch": (in_a_branch, "only matrices that are initializers"),
    "in a sparse tensor": (in_a_sparse_tensor, "only matrices that are initializers"),
}



@pytest.mark.parametrize("kind", HOSTILE)
def test_refused_by_name_wherever_a_file_is_read(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = HOSTILE[kind]
    assert read_onnx("m.onnx").files
    make(place)
    for read in (read_onnx, session, audit, check_file):
        with pytest.raises(ModelFileError, match=words):
            read("m.onnx")  # type: ignore[operator]
    for command in (["inspect", "m.onnx"], ["evaluate", "m.onnx", "data"], ["recipe", "show", "m.onnx"],
                    ["check", "m.onnx"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.removesuffix("\n").isprintable() and "SECRET" not in err


def test_bytes_have_nothing_beside_them(place: Path) -> None:
    with pytest.raises(ModelFileError, match="beside a file that is read by its path"):
        parse_onnx((place / "m.onnx").read_bytes(), "m")


def test_what_was_screened_is_what_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ONNX Runtime nor we open the data file a second time, whatever its name stands for by then."""
    read = reading.map_data

    def swapped(*arguments: object) -> object:
        files = read(*arguments)  # type: ignore[arg-type]
        data_of(place).unlink()
        return files

    monkeypatch.setattr(reading, "map_data", swapped)
    x = np.zeros((1, 3, 16, 16), np.float32)
    expected = compiled("vit", 4).session(1).run(None, {"x": x})[0]
    assert np.array_equal(session("m.onnx", threads=1).run(None, {"x": x})[0], expected)


def test_a_link_to_the_model_finds_no_data_elsewhere(place: Path, tmp_path: Path) -> None:
    """Its own folder is the one that it was named in."""
    (tmp_path / "m.onnx").symlink_to(place / "m.onnx")
    with pytest.raises(ModelFileError, match="no such file"):
        read_onnx(tmp_path / "m.onnx")
