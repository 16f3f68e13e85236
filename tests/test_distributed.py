"""Calibration shared by processes: under torchrun on the CPU, the same codes as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import Encoder, redraw, sequences
from onnx import numpy_helper

from repquant_fx.distributed import World, joined, under_torchrun
from repquant_fx.errors import InputError, LostProcessError
from repquant_fx.quantizers.observers import Observer


def test_every_batch_and_row_has_one_rank() -> None:
    for size in (1, 2, 3, 5):
        worlds = [World(rank, size) for rank in range(size)]
        for count in (0, 1, 4, 7):
            assert sorted(i for w in worlds for i in w.shard(count)) == list(range(count))
            assert [i for w in worlds for i in range(count)[w.row_shard(count)]] == list(range(count))


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert not under_torchrun()
    with joined() as world:
        assert world == World()
    x = {"x": torch.arange(3)}
    assert world.all_gather(x)[0].keys() == x.keys() and world.broadcast(lambda: None) is None
    with pytest.raises(InputError, match="torchrun"):
        World.current()


def test_a_lost_connection_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    for name in ("all_gather", "broadcast", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lost)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    world, x = World(0, 2), {"x": torch.arange(3)}
    for exchange in (lambda: world.all_gather(x), lambda: world.broadcast(lambda: x),
                     lambda: world.all_reduce([x["x"]])):
        with pytest.raises(LostProcessError, match=r"has ended or does not answer.*closed by peer.*work-dir") as caught:
            exchange()
        assert caught.value.exit_code == 2

    def full() -> dict[str, torch.Tensor]:
        raise RuntimeError("not ours")

    with pytest.raises(RuntimeError, match="not ours"):
        world.broadcast(full)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_merged_observers_are_one_observer(size: int) -> None:
    """Whoever saw a batch: the same sample in the same order, the same extremes."""
    batches = [torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    alone = Observer(True, 60, leading=2)
    alone.start(5)
    for batch in batches:
        alone(batch)
    ranks = [Observer(True, 60, leading=2) for _ in range(size)]
    for rank, observer in enumerate(ranks):
        mine = World(rank, size).shard(5)
        observer.start(5, mine)
        for number in mine:
            observer(batches[number])
    merged = Observer(True, 60, leading=2)
    merged.merge([observer.recorded() for observer in ranks])
    assert torch.equal(merged.sample(), alone.sample()) and torch.equal(merged.whole(), alone.whole())


SCRIPT = """
import sys, torch, torch.distributed as dist
from repquant_fx.distributed import World, joined
from repquant_fx.errors import InputError
with joined() as world:
    other = torch.full((3,), float(world.rank), dtype=torch.float64)
    world.all_reduce([other])
    assert other.tolist() == [1.0] * 3
    mine = {"a": torch.arange(world.rank * 4), "b": torch.tensor(1.5, dtype=torch.float64)} if world.rank else {}
    found = world.all_gather(mine)
    assert found[0] == {} and found[1]["a"].tolist() == [0, 1, 2, 3] and found[1]["b"].dtype == torch.float64
    assert world.broadcast(lambda: None) is None
    assert world.broadcast(lambda: {"x": torch.tensor(3 - world.rank)})["x"] == 3
    world.check_equal("same")
    try:
        world.check_equal(f"rank {world.rank}")
    except InputError as error:
        print("told", flush=True)
"""


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A run with no other network than this machine's own."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def test_what_processes_exchange(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found = torchrun(tmp_path, "script.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("told") == 2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with model, data and the file of a single process; and the arguments of compile."""
    folder = tmp_path_factory.mktemp("shared")
    program = torch.export.export(
        redraw(Encoder()), (sequences(4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, folder / "model.pt2")
    np.save(folder / "data.npy", sequences(56).numpy())
    arguments = [
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
    alone = subprocess.run(
        [sys.executable, *arguments, "--out", "alone.onnx", "--report", "alone.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert alone.returncode == 0, alone.stderr
    return folder, arguments


def integers(path: Path) -> dict[str, np.ndarray]:
    """Every integer constant: codes of weights and biases, zero points."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer
            if t.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_codes_as_alone(processes: int, shared: tuple[Path, list[str]]) -> None:
    folder, arguments = shared
    out = f"shared{processes}.onnx"
    work = ["--work-dir", f"work{processes}", "--offload-dir", f"offload{processes}"]
    found = torchrun(folder, *arguments, "--out", out, "--report", f"{out}.json", "--json", *work, processes=processes)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count('"file_bytes"') == 1 and found.stderr.count(f"wrote {out}") == 1, (
        "rank 0 alone writes and speaks"
    )
    alone, together = integers(folder / "alone.onnx"), integers(folder / out)
    assert alone.keys() == together.keys() and len(alone) > 20
    for name, codes in alone.items():
        if codes.dtype == np.int32:  # biases in steps of s_x * s_w: sums in another order may turn the last step
            assert np.abs(codes.astype(np.int64) - together[name]).max() <= 1, name
        else:
            assert np.array_equal(codes, together[name]), name
    reports = [json.loads((folder / name).read_text()) for name in ("alone.json", f"{out}.json")]
    assert reports[1]["node_executions"] <= 0.7 * reports[0]["node_executions"], "the batches are shared out"
    if processes == 2:
        return  # starting all of them once more takes as long again: for whoever asks for slow tests
    again = torchrun(folder, *arguments, "--out", out, "--force", "--report", f"{out}.json", *work, processes=processes)
    assert again.returncode == 0 and json.loads((folder / f"{out}.json").read_text())["node_executions"] == 0
    assert {k: v.tobytes() for k, v in integers(folder / out).items()} == {k: v.tobytes() for k, v in together.items()}


def test_bad_input_ends_all_processes(shared: tuple[Path, list[str]]) -> None:
    folder, arguments = shared
    found = torchrun(folder, *arguments, "--wbits", "12", "--out", "never.onnx")
    assert found.returncode != 0 and "wbits must be" in found.stderr and not (folder / "never.onnx").exists()


DEADLY = """
import os, signal, time
from pathlib import Path

import numpy as np

def batches():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [np.load("data.npy")]
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_others_in_words(shared: tuple[Path, list[str]]) -> None:
    """torchrun may be faster than the connection, then the other one ends by its signal."""
    folder, arguments = shared
    (folder / "deadly.py").write_text(DEADLY)
    found = torchrun(folder, *(a if a != "data.npy" else "deadly:batches" for a in arguments), "--out", "never.onnx")
    lines = [line for line in found.stderr.splitlines() if "repquant-fx: " in line]
    assert found.returncode != 0 and "internal error" not in found.stderr, found.stderr
    assert any("was killed (SIGKILL)" in line for line in lines), found.stderr
    assert any("has ended or does not answer" in line or "by SIGTERM" in line for line in lines), found.stderr
    assert not (folder / "never.onnx").exists()
