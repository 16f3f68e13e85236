"""Resuming: the same bytes from a work directory, whether it is empty, half full, full or damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import Encoder, canonical, redraw, sequences
from safetensors.torch import load_file, save_file
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx import pipeline as pipeline_module
from repquant_fx.checkpoint import fingerprint
from repquant_fx.compiler import CompiledModel
from repquant_fx.errors import OutputError, RepQuantWarning

RECIPE = Recipe(wbits=4, abits=4)


def compiled(work_dir: Path | None, model: nn.Module | None = None, recipe: Recipe = RECIPE, **options: Any) -> CompiledModel:
    return compile(model or redraw(Encoder()), options.pop("calibration", sequences(24)), recipe, batch_size=8, check=False,
                   example_inputs=[sequences(2)], work_dir=work_dir, **options)


def kept(work_dir: Path) -> list[Path]:
    return sorted(work_dir.glob("*/group-*.safetensors"))


@pytest.fixture(scope="module")
def whole() -> CompiledModel:
    """Without a work directory."""
    return compiled(None)


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the groups that are calibrated."""
    done: list[str] = []
    calibrate = pipeline_module._calibrate

    def watched(state, segment, group):
        done.append(group.path)
        return calibrate(state, segment, group)

    monkeypatch.setattr(pipeline_module, "_calibrate", watched)
    return done


def test_from_any_number_of_finished_groups(whole: CompiledModel, tmp_path: Path, no_calibration: list[str]) -> None:
    assert compiled(tmp_path).to_bytes() == whole.to_bytes()
    files = kept(tmp_path)
    assert len(files) == len(no_calibration) >= 6
    for finished in (len(files), len(files) // 2, 1):
        for path in files[finished:]:
            path.unlink()
        before = {p: p.stat().st_mtime_ns for p in kept(tmp_path)}
        no_calibration.clear()
        again = compiled(tmp_path)
        assert again.to_bytes() == whole.to_bytes()
        assert len(no_calibration) == len(files) - finished
        assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "a finished group was written again"
        if finished == len(files):
            assert again.report["node_executions"] == 0
        assert [e.get("weight") for e in again.report["layers"]] == [e.get("weight") for e in whole.report["layers"]]


@pytest.mark.parametrize("changes", [{"correction": False}, {"gptq": False, "correction": False}, {"norm": "channelwise"}, {"norm": "smooth"},
                                     {"softmax": "uniform"}], ids=str)
def test_every_kind_of_decision_is_kept(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(wbits=4, abits=4, **changes)
    first = compiled(tmp_path, recipe=recipe)
    assert compiled(tmp_path, recipe=recipe).to_bytes() == first.to_bytes() == compiled(None, recipe=recipe).to_bytes()


@pytest.mark.parametrize("damage", ["truncated", "text", "other"])
def test_damaged_files_are_made_anew(damage: str, whole: CompiledModel, tmp_path: Path) -> None:
    compiled(tmp_path)
    path = kept(tmp_path)[1]
    good = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("not tensors")
    else:
        save_file({"something": torch.zeros(3)}, path)
    with pytest.warns(RepQuantWarning, match="anew"):
        assert compiled(tmp_path).to_bytes() == whole.to_bytes()
    assert load_file(path).keys() == good.keys()


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    compiled(tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"} == {".safetensors", ".json"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    compiled(tmp_path)


def test_other_compiles_have_other_folders(tmp_path: Path) -> None:
    """Model, data, recipe: each has its own; all in one directory."""
    x = sequences(24)
    compiled(tmp_path)
    changed = redraw(Encoder())
    with torch.no_grad():
        changed.head.weight[0, 0] += 1e-3
    other = x.clone()
    other[3, 2, 1] += 1e-3
    for index, options in enumerate(({"model": changed}, {"calibration": other}, {"recipe": Recipe(wbits=4, abits=5)}, {"seed": 1})):
        compiled(tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == index + 2


def test_fingerprint_sees_the_graph_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import repquant_fx.checkpoint as module

    x = [(sequences(4),)]
    first = fingerprint(canonical(redraw(Encoder()), sequences()), x, RECIPE, 0)
    assert first == fingerprint(canonical(redraw(Encoder()), sequences()), x, RECIPE, 0)
    assert first != fingerprint(canonical(redraw(Encoder(causal=True)), sequences()), x, RECIPE, 0)
    assert first != fingerprint(canonical(redraw(Encoder()), sequences()), [*x, *x], RECIPE, 0)
    monkeypatch.setattr(module, "VERSION", "other")
    assert first != fingerprint(canonical(redraw(Encoder()), sequences()), x, RECIPE, 0)


def test_a_second_process_is_told(tmp_path: Path) -> None:
    compiled(tmp_path)
    (folder,) = tmp_path.iterdir()
    with FileLock(folder / "lock"), pytest.raises(OutputError, match="another process compiles the same model"):
        compiled(tmp_path)
    compiled(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for option in ("--work-dir", "--offload-dir"):
        found = subprocess.run([sys.executable, "-m", "repquant_fx", "compile", "model.pt2", "--out", str(tmp_path / "m.onnx"),
                                option, str(tmp_path / "file" / "w")], capture_output=True, text=True, timeout=120)
        assert found.returncode == 2 and "is not a folder" in found.stderr and "Traceback" not in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_killed_and_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle of a compile; the same command then gives the bytes of a run that nobody disturbed."""
    program = torch.export.export(redraw(Encoder(4)), (sequences(4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, tmp_path / "model.pt2")
    np.save(tmp_path / "data.npy", sequences(64).numpy())
    command = [sys.executable, "-m", "repquant_fx", "compile", "model.pt2", "--calib", "data.npy", "--wbits", "4", "--abits", "4",
               "--batch-size", "8"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL,
                               "stderr": subprocess.PIPE, "text": True}
    work, resumed = tmp_path / "work", [*command, "--work-dir", "work", "--out", "resumed.onnx", "--report", "resumed.json"]
    process = subprocess.Popen(resumed, **options)
    try:
        deadline = time.monotonic() + 120
        while len(kept(work)) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, error
    finished = {p: p.stat().st_mtime_ns for p in kept(work)}
    assert len(finished) >= 4 and not (tmp_path / "resumed.onnx").exists()
    assert subprocess.run([*command, "--out", "whole.onnx"], timeout=300, **options).returncode == 0
    again = subprocess.run(resumed, timeout=300, **options)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert len(kept(work)) > len(finished), "it was killed too late to tell"
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
