"""ONNX Runtime runs what a file says, when it folds constants already: under the guard, with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compiled import compiled
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from repquant_fx.errors import ModelFileError
from repquant_fx.evaluation.runners import open_runner
from repquant_fx.inspection import inspect_file
from repquant_fx.options import Source
from repquant_fx.security import channel


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a supervisor hears of guarded blocks."""
    found: list[tuple[str, Any]] = []

    def tell(event: str, **fields: Any) -> None:
        if event in ("guarded", "free"):
            found.append((event, fields.get("what")))

    monkeypatch.setattr(channel, "tell", tell)
    return found


@pytest.mark.parametrize("read", [inspect_file, lambda path: open_runner(Source(path))], ids=["inspect", "evaluate"])
def test_a_session_is_made_under_the_guard(
    read: Any, told: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: object, **__: object) -> NoReturn:
        os.system("touch ran")
        raise AssertionError

    path = tmp_path / "m.onnx"
    path.write_bytes(compiled("vit", 4).to_bytes())
    read(str(path))
    assert told == [("guarded", f"reading {path}"), ("free", None)]
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(ModelFileError, match="it tried to start a process"):
        read(str(path))


def test_a_session_runs_under_the_guard(told: list[tuple[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(compiled("vit", 4).to_bytes())
    runner = open_runner(Source(str(path)))
    told.clear()
    runner({runner.inputs[0].name: torch.zeros(1, 3, 16, 16)})
    assert told == [("guarded", f"running {path}"), ("free", None)]


def endless() -> onnx.ModelProto:
    """A loop of 2^62 turns around images."""
    shape = [1, 3, 4, 4]
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y", "v", "w")}
    more = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("c", "d")]
    turn = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    same = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["w"])]
    body = helper.make_graph(same, "body", [turn, more[0], value["v"]], [more[1], value["w"]])
    turns = [numpy_helper.from_array(np.array(2**62), "n"), numpy_helper.from_array(np.array(True), "t")]
    node = helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)
    graph = helper.make_graph([node], "g", [value["x"]], [value["y"]], initializer=turns)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no supervisor")
def test_a_file_that_does_not_end(tmp_path: Path) -> None:
    onnx.save(endless(), tmp_path / "m.onnx")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "x.png")
    done = subprocess.run(
        [sys.executable, "-m", "repquant_fx", "evaluate", "m.onnx", "--data", "images", "--load-timeout", "1",
         "--threads", "1", "--log-json"],
        cwd=tmp_path, text=True, capture_output=True)
    errors = [event for event in map(json.loads, done.stderr.splitlines()) if event["event"] == "error"]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0]["message"].startswith("error: running m.onnx: it did not end within 1 s"), errors
