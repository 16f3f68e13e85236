"""Signals at any moment of a real compile: the outcome is one of those that are documented, nothing else."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import onnx
import pytest

ARCH = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=12,num_heads=3,depth=1,num_classes=2"
ROUNDS = int(os.environ.get("SIGNAL_ROUNDS", "20"))
EXITS = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated by SIGTERM"),
    signal.SIGHUP: (129, "terminated by SIGHUP"),
}


def events(stream: IO[str] | None, count: int) -> list[dict[str, str]]:
    """The next log lines, `count` at most."""
    assert stream is not None
    found = []
    for _, line in zip(range(count), stream):
        found.append(json.loads(line))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no supervisor")
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_signal_after_some_event(seed: int, tmp_path: Path) -> None:
    """After a random log line (there are about fifteen), and a random number of turns of a loop, so that it falls
    between two lines.
    """
    draw = random.Random(seed)
    number = draw.choice(list(EXITS))
    code, words = EXITS[number]
    whole_job = draw.random() < 0.5
    out = draw.choice(["m.onnx", "out"])
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "repquant_fx",
            "compile",
            ARCH,
            "--out",
            out,
            "--report",
            "r.json",
            "--work-dir",
            "work",
            "--calib-samples",
            "64",
            "--log-json",
        ],
        cwd=tmp_path,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"},
    )
    try:
        said = events(process.stderr, draw.randrange(1, 16))
        for _ in range(draw.randrange(200_000)):
            pass
        if process.poll() is None:
            (os.killpg if whole_job else os.kill)(process.pid, number)
        _, rest = process.communicate()
    finally:
        process.kill()
    errors = [e for e in (*said, *map(json.loads, rest.splitlines())) if e["event"] == "error"]
    model, report = tmp_path / ("m.onnx" if out == "m.onnx" else "out/model.onnx"), tmp_path / "r.json"
    assert process.returncode in (0, code), (process.returncode, rest)
    if process.returncode == 0:
        assert not errors and model.exists() and report.exists()
    else:
        assert len(errors) == 1 and errors[0]["message"].startswith(words), errors
        written = "already written" in errors[0]["message"]
        assert model.exists() == report.exists() == written, errors
    if model.exists():
        onnx.checker.check_model(onnx.load(model))
        json.loads(report.read_text())
    left = {p.name for p in tmp_path.iterdir()} - {"temporary", "work", "m.onnx", "out", "r.json"}
    assert not left and not list((tmp_path / "temporary").iterdir()), left
    assert not [p for p in tmp_path.rglob(".*")], "hidden files of writes that did not end"
