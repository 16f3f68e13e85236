"""--abits none and --group-size on the command line, and what the other commands say of such a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import FAST, redraw
from test_weight_only import Block, X

from repquant_fx.file_check import check_file
from repquant_fx.inspection import inspect


def test_on_the_command_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    torch.export.save(torch.export.export(redraw(Block()), (X[:2],), dynamic_shapes=({0: torch.export.Dim("b")},)),
                      tmp_path / "m.pt2")
    np.save(tmp_path / "x.npy", X.numpy())
    out = tmp_path / "m.onnx"
    found = cli("compile", tmp_path / "m.pt2", "--calib", tmp_path / "x.npy", "--out", out, *FAST, "--wbits", 4,
                "--abits", "none", "--group-size", 32)
    assert found.code == 0 and "weights alone of 3 layers (W4A32g32)" in found.err and "left alone" not in found.err
    assert "outputs are at most" in found.err and "3 of 3 products with weights alone" in found.err
    shown = cli("inspect", out)
    assert "W4A32" in shown.out and "codes of weights (MatMulNBits) by ONNX Runtime: 2 of 2" in shown.out
    rows = inspect(out)
    assert rows.about["quantized_parameters"] == 3 * 40 * 24
    assert rows.about["quantized_bytes"] > 3 * 40 * 24 // 2
    assert check_file(out).parity.problems() == []
    shown = cli("recipe", "show", out)
    assert "abits: \"none\"" in shown.out and "group_size: 32" in shown.out
    refused = cli("compile", tmp_path / "m.pt2", "--out", tmp_path / "n.onnx", "--group-size", 32)
    assert refused.code == 2 and "needs activations in float" in refused.err
    assert cli("compile", tmp_path / "m.pt2", "--out", out, "--abits", "some").code == 2
