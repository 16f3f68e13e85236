"""A structured fuzzer of `.pt2` files, see `mutants`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed, count", [(0, 40), pytest.param(1, 1000, marks=pytest.mark.slow)])
def test_mutants_load_or_are_refused(seed: int, count: int, tmp_path: Path) -> None:
    """Changed at random in operators, arguments, shapes, types and indices, in a process of their own: none ends it."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutants.py")), str(seed), str(count)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=3600,
    )
    assert done.returncode == 0, f"exit {done.returncode} after: {done.stdout[-300:]} {done.stderr[-3000:]}"
    outcomes = done.stdout.split("outcomes")[-1]
    assert "loaded" in outcomes and "refused" in outcomes
