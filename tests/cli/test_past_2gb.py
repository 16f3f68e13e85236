"""A model whose weights pass 2 GB in the file: every command takes it. Needs some 12 GB of memory and 8 of disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import FAST
from torch import Tensor, nn

from repquant_fx.exporters.apart import LARGEST_FILE

ROWS, WIDTH = 1_100_000, 512  # float32 in the file: 2.25 GB


class Wide(nn.Module):
    """A table, which stays float, and a Linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide.pt2`, `tokens.npy` and, of both lines of rows, what the float model gives."""
    root = tmp_path_factory.mktemp("wide")
    tokens = np.random.default_rng(0).integers(0, ROWS, (32, 8))
    np.save(root / "tokens.npy", tokens)
    with torch.no_grad():
        model = Wide().eval()
        program = torch.export.export(model, (torch.from_numpy(tokens[:2]),),
                                      dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        np.save(root / "expected.npy", model(torch.from_numpy(tokens)).numpy())
    torch.export.save(program, root / "wide.pt2")
    return root


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a command prints, in a process of its own; with its peak memory and its time."""
    measured = ("import resource, subprocess, sys, time; began = time.time(); "
                "code = subprocess.call([sys.executable, '-m', 'repquant_fx', *sys.argv[1:]]); "
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 'GB', time.time() - began, 's',"
                " file=sys.stderr); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", measured, *arguments, "--json"], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(arguments[0], done.stderr)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_every_command_takes_it(wide: Path) -> None:
    report = command(wide, "compile", "wide.pt2", "--calib", "tokens.npy", *FAST, "--out", "wide.onnx")
    data = wide / report["data_file"]
    assert data.stat().st_size > LARGEST_FILE and (wide / "wide.onnx").stat().st_size < 1 << 20
    assert report["file_bytes"] > LARGEST_FILE and report["parity"]["agrees"]
    session = onnxruntime.InferenceSession(str(wide / "wide.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: np.load(wide / "tokens.npy")})[0]
    del session
    expected = np.load(wide / "expected.npy")
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05
    assert command(wide, "inspect", "wide.onnx")["about"]["file_bytes"] == report["file_bytes"]
    assert command(wide, "check", "wide.onnx", "--data", "tokens.npy")["parity"]["agrees"]
    assert command(wide, "recipe", "show", "wide.onnx")["wbits"] == 8
