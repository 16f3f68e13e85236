"""`--external-data`: a model and its data file, by all commands, and what happens to the pair that it replaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiled import compiled, inputs
from helpers import FAST
from language import LINES, save
from test_cli import subprocess_of

from repquant_fx import files
from repquant_fx.cli import main
from repquant_fx.compiled import CompiledModel
from repquant_fx.errors import OutputError
from repquant_fx.exporters import apart
from repquant_fx.exporters.apart import is_data_of
from repquant_fx.exporters.reading import read_onnx
from repquant_fx.runtime import session


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def external(bits: int) -> CompiledModel:
    """A model that is compiled already, to be saved with external data."""
    result = compiled("vit", bits)
    return CompiledModel(result.model, dict(result.report), result.graph_module, result.quantizers, result.parity,
                         {"config.json": b"{}"}, external_data=True)


def computes(path: Path, bits: int) -> bool:
    x = {"x": inputs("vit", 2).numpy()}
    expected = compiled("vit", bits).session(1).run(None, x)[0]
    return np.array_equal(session(path, threads=1).run(None, x)[0], expected)


@pytest.fixture(scope="module")
def pair(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain.onnx` and `apart.onnx` of the same command, with `--external-data` and without; each with a record."""
    root = tmp_path_factory.mktemp("external")
    command = ["compile", place / "weights.safetensors", "--calib", place / "calib.npy", *FAST]
    assert main([*map(str, command), "--out", str(root / "plain.onnx"), "--report", str(root / "plain.json")]) == 0
    done = subprocess_of(*command, "--out", "apart.onnx", "--report", "apart.json", "--json", "--external-data",
                         cwd=root)
    assert done.returncode == 0, done.stderr
    (root / "apart.out").write_text(done.stdout)
    (root / "apart.err").write_text(done.stderr)
    return root


def test_the_pair_is_the_one_file_in_two(pair: Path) -> None:
    (data,) = pair.glob("*.data")
    assert is_data_of(data.name, "apart.onnx") and data.stat().st_size > 4096
    file = read_onnx(pair / "apart.onnx")
    assert file.apart.to_bytes() == (pair / "plain.onnx").read_bytes()
    onnx.checker.check_model(str(pair / "apart.onnx"), full_check=True)
    assert f"wrote apart.onnx and {data.name} (" in (pair / "apart.err").read_text()
    said, plain = (json.loads((pair / name).read_text()) for name in ("apart.out", "plain.json"))
    assert said["data_file"] == json.loads((pair / "apart.json").read_text())["data_file"] == data.name
    assert said["file_bytes"] == data.stat().st_size + (pair / "apart.onnx").stat().st_size
    assert "data_file" not in plain and plain["file_bytes"] == (pair / "plain.onnx").stat().st_size


@pytest.mark.parametrize("command", [
    ["inspect", "--json"], ["recipe", "show", "--json"], ["check", "--json"],
    ["evaluate", "--json", "--data", "images"]],
    ids=lambda command: " ".join(each for each in command if each != "--json"))
def test_every_command_says_the_same_of_both(command: list[str], pair: Path, place: Path, cli,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair)
    if not Path("images").exists():
        Path("images").symlink_to(place / "images")
    one, two = (cli(*command[:1 + (command[0] == "recipe")], f"{name}.onnx", *command[1 + (command[0] == "recipe"):])
                for name in ("plain", "apart"))
    assert one.code == two.code == 0, two.err
    said, also = one.json, two.json
    for each in (said, also):
        for key in ("model", "source", "file_bytes", "seconds", "images_per_second"):
            each.pop(key, None)
        each.get("about", {}).pop("file_bytes", None)
    assert said == also


def test_a_subprocess_reads_it(pair: Path) -> None:
    """Under the supervisor, confined where the kernel can: the audit's weights go to /dev/null."""
    done = subprocess_of("inspect", "apart.onnx", cwd=pair)
    assert done.returncode == 0 and "apart.onnx: W8A8" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_directory_of_a_language_model(tmp_path: Path, cli) -> None:
    """It decodes, and ONNX Runtime finds the data by itself."""
    import onnxruntime

    save("llama", tmp_path / "llama", with_tokenizer=True)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    found = cli("compile", tmp_path / "llama", "--calib", tmp_path / "text.txt", "--with-past", *FAST,
                "--external-data", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert [name for name in names(tmp_path / "out") if is_data_of(name, "model.onnx")]
    onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert cli("generate", tmp_path / "out", "Once", "--tokens", 3).code == 0
    assert cli("evaluate", tmp_path / "out" / "model.onnx", "--data", tmp_path / "text.txt").code == 0


def test_past_a_size_it_is_done_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compiled("vit", 4)
    monkeypatch.setattr("repquant_fx.compiled.BESIDE_FROM", result.model.size() + 1)
    result.save(tmp_path / "one.onnx")
    monkeypatch.setattr("repquant_fx.compiled.BESIDE_FROM", result.model.size())
    external(4).save(tmp_path / "two.onnx")
    assert len(names(tmp_path)) == 3 and apart.BESIDE_FROM == 1_500_000_000


# ---- old pairs, failures ---------------------------------------------------------------------------------------------


def test_a_replaced_model_takes_its_data_along(tmp_path: Path) -> None:
    """And nothing else: neither what another model refers to nor what has a like name."""
    path = tmp_path / "m.onnx"
    external(8).save(path)
    (first,) = tmp_path.glob("*.data")
    others = ["m.onnx.data", "m.onnx.0123456789abcdef.data", "n.onnx.0123456789abcdef.data"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    external(8).save(path, force=True)
    assert first.exists() and computes(path, 8)
    external(4).save(path, force=True)
    assert not first.exists() and computes(path, 4)
    compiled("vit", 8).save(path, force=True)
    assert names(tmp_path) == sorted(["m.onnx", *others]) and computes(path, 8)


def test_a_replaced_model_of_somebody_else_loses_nothing(tmp_path: Path) -> None:
    """Only a data file of the model's own name goes, and nothing that a model only claims to own."""
    external(4).save(tmp_path / "n.onnx")
    shutil.copy(tmp_path / "n.onnx", tmp_path / "m.onnx")
    before = set(names(tmp_path))
    external(8).save(tmp_path / "m.onnx", force=True)
    assert before < set(names(tmp_path)) and computes(tmp_path / "n.onnx", 4)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    external(4).save(tmp_path / "m.onnx", force=True)
    assert computes(tmp_path / "m.onnx", 4)


def test_directories_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    external(8).save(out, report=out / "r.json")
    assert computes(out / "model.onnx", 8) and len(names(out)) == 4
    external(4).save(out, force=True)
    assert computes(out / "model.onnx", 4) and len(names(out)) == 4 and names(tmp_path) == ["out"]
    with pytest.raises(OutputError, match="--force"):
        external(8).save(out)
    assert computes(out / "model.onnx", 4) and len(names(out)) == 4


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_crash_at_any_rename_leaves_a_model_that_runs(directory: bool, renames: int, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGKILL or a loss of power would: what stands under the model's name runs, the old one or the new one."""
    target = tmp_path / ("out" if directory else "m.onnx")
    path = external(8).save(target)
    replace, done = os.replace, []

    def crash(*arguments: object) -> None:
        if len(done) == renames:
            raise SystemExit
        done.append(arguments)
        replace(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files.os, "replace", crash)
    monkeypatch.setattr(files, "_discard", lambda each: None)  # nor does it clean up
    with pytest.raises(SystemExit) if renames < 2 + directory else nullcontext():
        external(4).save(target, force=True)
    monkeypatch.undo()
    assert computes(path, 8) or computes(path, 4)


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(8).save(tmp_path / "m.onnx")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        external(4).save(path, force=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_the_data_is_never_held_as_a_whole(tmp_path: Path) -> None:
    """Saving takes no more memory than a few parts: measured in a process of its own."""
    script = """
import sys, numpy as np, onnx_ir as ir, tracemalloc
from pathlib import Path
from repquant_fx.exporters.apart import OnnxModel, keep_apart
from repquant_fx.files import write_together
values = [ir.Value(name=f"w{i}", const_value=ir.Tensor(np.full((1 << 12, 1 << 12), i, np.int8), name=f"w{i}"),
                   type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape((1 << 12, 1 << 12))) for i in range(4)]
model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21}), ir_version=10)
files = keep_apart(model)
model = OnnxModel(ir.to_proto(model), files)
tracemalloc.start()
data, beside = model.beside("m.onnx")
write_together({**beside, "m.onnx": data})
print(tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 20 and len(names(tmp_path)) == 2
