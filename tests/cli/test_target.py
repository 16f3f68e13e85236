"""--target and --opset, and the list of targets, on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers import FAST

from repquant_fx.targets import DEFAULT, TARGETS


@pytest.fixture
def compiled(cli: Callable[..., Any], place: Path, tmp_path: Path) -> Callable[..., Any]:
    """Compile with switches; gives the result and where the file would be."""
    def run(*switches: object) -> tuple[Any, Path]:
        out = tmp_path / "m.onnx"
        source = [place / "model.pt2", "--calib", place / "tokens.npy"]
        return cli("compile", *source, "--out", out, "--force", "--quiet", *FAST, *switches), out
    return run


def test_the_list_for_people_and_for_programs(cli: Callable[..., Any]) -> None:
    found = cli("targets")
    assert found.code == 0 and found.err == "" and all(f"{name}: " in found.out for name in TARGETS)
    assert "functions inlined" in found.out and "weights of at most 7 bits" in found.out and "(default)" in found.out
    rows = cli("targets", "--json").json
    assert [row["name"] for row in rows] == list(TARGETS) and [r["name"] for r in rows if r["default"]] == [DEFAULT]


def test_a_file_for_openvino(compiled: Callable[..., Any], cli: Callable[..., Any]) -> None:
    found, out = compiled("--target", "openvino", "--wbits", 4, "--no-check")
    proto = onnx.load(out)
    assert found.code == 0 and not proto.functions and {node.domain for node in proto.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
    shown = cli("inspect", out)
    assert "for openvino, opset 21" in shown.out
    inspection = cli("inspect", out, "--json").json
    assert inspection["about"]["target"] == "openvino"
    (row,) = (row for row in inspection["rows"] if row["kind"] == "softmax → matmul")
    assert 0 < row["scale"] <= 1 and not row["integer"] and "powers of two" in row["reason"]


def test_an_opset_is_written_or_refused_by_the_node(compiled: Callable[..., Any]) -> None:
    found, out = compiled("--opset", 20, "--abits", 6)
    proto = onnx.load(out)
    assert found.code == 0 and proto.ir_version == 9 and proto.opset_import[0].version == 20 and proto.functions
    out.unlink()
    found, _ = compiled("--target", "onnx", "--opset", 20, "--wbits", 4)
    assert found.code == 2 and "takes no tensor(int4) in opset 20; opset 21 brought it" in found.err
    assert "the node 'embed/" in found.err and not out.exists()


@pytest.mark.parametrize("switches, words", [
    (["--target", "openvinno"], "did you mean openvino?"),
    (["--target", "openvino", "--container", "int4"], "takes no container int4"),
    (["--opset", "16"], "from 17 to 27"),
])
def test_bad_input_loads_nothing(switches: list[str], words: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    found = cli("compile", "missing.pt2", "--out", tmp_path / "m.onnx", *switches)
    assert found.code == 2 and words in found.err and not list(tmp_path.iterdir())


def test_check_of_a_file_made_before(compiled: Callable[..., Any], cli: Callable[..., Any], place: Path,
                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, out = compiled("--target", "onnx", "--json")
    assert found.json["target"] == "onnx" and found.json["runtime"]["parity"]["agrees"]
    shown = cli("check", out, "--data", place / "tokens.npy")
    assert shown.code == 0 and shown.err == "" and "for onnx, on 4 samples of" in shown.out
    assert "checked in onnx.reference at each of" in shown.out and "of the file run operator by operator" in shown.out
    data = cli("check", out, "--runtime", "ort", "--json", "--quiet").json
    assert data["target"] == "onnx" and data["parity"]["agrees"] and data["parity"]["samples"] == 4
    assert cli("check", tmp_path / "missing.onnx").code == 2
    from repquant_fx import parity

    monkeypatch.setattr(parity, "SHARE_LIMIT", -1.0)
    failed = cli("check", out, "--runtime", "ort")
    assert failed.code == 3 and "disagree beyond float rounding" in failed.err
