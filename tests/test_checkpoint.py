"""Resuming: the same bytes from a work directory, whether it is empty, half full, full or damaged."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Encoder, canonical, match, output, redraw, sequences
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor
from torch.fx import GraphModule

import repquant_fx
from repquant_fx import Recipe, compile, exporters, passes
from repquant_fx.checkpoint import code_digest, fingerprint, open_checkpoint
from repquant_fx.cli import main
from repquant_fx.compiled import CompiledModel
from repquant_fx.distributed import World
from repquant_fx.errors import OutputError, RepQuantWarning
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.pipeline import equalize_layers, quantize_sequentially, sequential

RECIPE = Recipe(wbits=4, abits=4)


def compiled(work_dir: Path | None) -> CompiledModel:
    return compile(
        redraw(Encoder()),
        sequences(24),
        RECIPE,
        batch_size=8,
        check=False,
        example_inputs=[sequences(2)],
        work_dir=work_dir,
    )


def kept(work_dir: Path) -> list[Path]:
    return sorted(work_dir.glob("*/group-*.safetensors"))


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the groups that are calibrated."""
    done: list[str] = []
    calibrate = sequential._calibrate

    def watched(state, segment, group, statistics):
        done.append(group.path)
        return calibrate(state, segment, group, statistics)

    monkeypatch.setattr(sequential, "_calibrate", watched)
    return done


def test_from_any_number_of_finished_groups(tmp_path: Path, calibrated: list[str]) -> None:
    whole = compiled(None)
    calibrated.clear()
    assert compiled(tmp_path).to_bytes() == whole.to_bytes()
    files = kept(tmp_path)
    assert len(files) == len(calibrated) >= 6
    for finished in (len(files), len(files) // 2):
        for path in files[finished:]:
            path.unlink()
        before = {p: p.stat().st_mtime_ns for p in kept(tmp_path)}
        calibrated.clear()
        again = compiled(tmp_path)
        assert again.to_bytes() == whole.to_bytes()
        assert len(calibrated) == len(files) - finished
        assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "a finished group was written again"
        if finished == len(files):
            assert again.report["node_executions"] == 0
        assert [e.get("weight") for e in again.report["layers"]] == [e.get("weight") for e in whole.report["layers"]]


def pipeline(graph_module: GraphModule, work_dir: Path | None, recipe: Recipe = RECIPE) -> Tensor:
    """What `compile` does between capture and export, which takes most of its time; gives the quantized graph's output.
    """
    x, graph_module = sequences(), copy.deepcopy(graph_module)
    batches = [(b,) for b in x.split(8)]
    plan = match(graph_module, recipe)
    with open_checkpoint(work_dir, fingerprint(graph_module, batches, recipe, 0), {}, World()) as checkpoint:
        plan = equalize_layers(graph_module, plan, batches, recipe, checkpoint)
        run_passes(graph_module, [InsertObservers(plan, len(batches))])
        quantize_sequentially(graph_module, plan, batches, recipe, checkpoint)
    return output(graph_module, x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"correction": False},
        {"gptq": False, "correction": False},
        {"norm": "channelwise"},
        {"norm": "smooth"},
        {"softmax": "uniform"},
    ],
    ids=str,
)
def test_every_kind_of_decision_is_kept(
    changes: dict[str, Any], encoder_graph, tmp_path: Path, calibrated: list[str]
) -> None:
    recipe = Recipe(wbits=4, abits=4, **changes)
    first = pipeline(encoder_graph(), tmp_path, recipe)
    calibrated.clear()
    assert torch.equal(pipeline(encoder_graph(), tmp_path, recipe), first) and not calibrated
    assert torch.equal(pipeline(encoder_graph(), None, recipe), first)


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "other", "shape", "zeros", "zeros with its digest", "another's"]
)
def test_damaged_files_are_made_anew(damage: str, encoder_graph, tmp_path: Path, calibrated: list[str]) -> None:
    first = pipeline(encoder_graph(), tmp_path)
    path = kept(tmp_path)[1]
    good = load(path.read_bytes())  # a mapped file would change with the damage
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("not tensors")
    elif damage == "shape":
        save_file({k: t[:-1].clone() if "codes" in k else t for k, t in good.items()}, path)
    elif damage.startswith("zeros"):  # codes of another model, in a sound file
        with safe_open(path, "pt") as file:
            metadata = file.metadata() if "digest" in damage else None
        save_file({k: torch.zeros_like(t) for k, t in good.items()}, path, metadata)
    elif damage == "another's":
        path.write_bytes(kept(tmp_path)[2].read_bytes())
    else:
        save_file({"something": torch.zeros(3)}, path)
    calibrated.clear()
    with pytest.warns(RepQuantWarning, match="anew"):
        assert torch.equal(pipeline(encoder_graph(), tmp_path), first)
    again = load(path.read_bytes())
    assert (
        len(calibrated) == 1 and again.keys() == good.keys() and all(torch.equal(t, good[k]) for k, t in again.items())
    )


def test_nothing_is_unpickled(encoder_graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline(encoder_graph(), tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"} == {".safetensors", ".json"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    graph_module = encoder_graph()
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    pipeline(graph_module, tmp_path)


def test_what_a_fingerprint_sees(encoder_graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, graph, data (and how it is batched), recipe, seed, version: another value, another folder."""
    import repquant_fx.checkpoint as module

    x = [(sequences(4),)]
    digests = [fingerprint(encoder_graph(), x, RECIPE, 0)]
    assert digests[0] == fingerprint(encoder_graph(), x, RECIPE, 0)
    changed = encoder_graph()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    other = x[0][0].clone()
    other[3, 2, 1] += 1e-3
    digests += [
        fingerprint(changed, x, RECIPE, 0),
        fingerprint(canonical(redraw(Encoder(causal=True)), sequences()), x, RECIPE, 0),
        fingerprint(encoder_graph(), [(other,)], RECIPE, 0),
        fingerprint(encoder_graph(), [(b,) for b in x[0][0].split(2)], RECIPE, 0),
        fingerprint(encoder_graph(), x, Recipe(wbits=4, abits=5), 0),
        fingerprint(encoder_graph(), x, RECIPE, 1),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", "other")
        digests.append(fingerprint(encoder_graph(), x, RECIPE, 0))
    monkeypatch.setattr(module, "code_digest", lambda: "other")
    digests.append(fingerprint(encoder_graph(), x, RECIPE, 0))
    assert len(set(digests)) == len(digests)


def test_the_code_counts_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest()
    for package in (repquant_fx, exporters, passes):
        place = tmp_path / package.__name__
        links = ("passes", "exporters") if package is repquant_fx else ()  # that `make` may have made
        shutil.copytree(package.__path__[0], place, ignore=shutil.ignore_patterns("__pycache__", *links))
        monkeypatch.setattr(package, "__path__", [str(place)])
    assert code_digest.__wrapped__() == before
    (tmp_path / "repquant_fx.passes/base.py").write_text("changed = True\n")
    assert code_digest.__wrapped__() != before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The same compile twice is refused while the first one runs; another one is not; leftovers of killed writes go."""
    with open_checkpoint(tmp_path, "a" * 64, {}, World()) as checkpoint:
        assert checkpoint.folder is not None
        (checkpoint.folder / ".group-0000.safetensors.xyz").write_text("half")
        with (
            pytest.raises(OutputError, match="another process compiles the same model"),
            open_checkpoint(tmp_path, "a" * 64, {}, World()),
        ):
            pass
        with open_checkpoint(tmp_path, "b" * 64, {}, World()):
            assert len(list(tmp_path.iterdir())) == 2
    with open_checkpoint(tmp_path, "a" * 64, {}, World()) as checkpoint:
        assert checkpoint.folder is not None and not list(checkpoint.folder.glob(".*"))


def test_a_folder_with_things_of_others(tmp_path: Path) -> None:
    """A hidden folder stays; a name that no folder can have is bad input."""
    with open_checkpoint(tmp_path, "a" * 64, {}, World()) as checkpoint:
        assert checkpoint.folder is not None
        (checkpoint.folder / ".git").mkdir()
    with open_checkpoint(tmp_path, "a" * 64, {}, World()) as checkpoint:
        assert (checkpoint.folder / ".git").is_dir()
    for name in ("n" * 256, "n" * 5000, "/".join(["n" * 200] * 30), "a\0b"):
        assert (
            main(["compile", "model.pt2", "--out", str(tmp_path / "m.onnx"), "--work-dir", str(tmp_path / name)]) == 2
        )


def test_a_folder_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for option in ("--work-dir", "--offload-dir"):
        assert (
            main(["compile", "model.pt2", "--out", str(tmp_path / "m.onnx"), option, str(tmp_path / "file" / "w")]) == 2
        )
        assert "is not a folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# the command line, which ends outright when the fourth group is on disk; torch is loaded, so it works in one process
KILLED = """
import os, signal, sys
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.cli import main

save, groups = Checkpoint.save, []
def counted(self, name, tensors):
    save(self, name, tensors)
    groups.extend([name] * name.startswith("group-"))
    if len(groups) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = counted
sys.exit(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_and_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle of a compile; the same command then gives the bytes of a run that nobody disturbed."""
    program = torch.export.export(
        redraw(Encoder(2)), (sequences(4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    np.save(tmp_path / "data.npy", sequences(64).numpy())
    command = [
        sys.executable,
        "-m",
        "repquant_fx",
        "compile",
        "model.pt2",
        "--calib",
        "data.npy",
        "--wbits",
        "4",
        "--abits",
        "4",
        "--batch-size",
        "8",
    ]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    work, resumed = (
        tmp_path / "work",
        [*command, "--work-dir", "work", "--out", "resumed.onnx", "--report", "resumed.json"],
    )
    killed = subprocess.run([sys.executable, "-c", KILLED, *resumed[3:]], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {p: p.stat().st_mtime_ns for p in kept(work)}
    assert len(finished) == 4 and not (tmp_path / "resumed.onnx").exists()
    assert subprocess.run([*command, "--out", "whole.onnx"], **options).returncode == 0
    again = subprocess.run(resumed, **options)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert len(kept(work)) > len(finished), "it was killed too late to tell"
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
