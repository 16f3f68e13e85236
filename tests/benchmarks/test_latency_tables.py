"""What the benchmark of speed prints of its rows, old and new."""

from __future__ import annotations

import latency
import pytest


def timed(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.8 * median, "high": 1.25 * median, "cpu": 2 * median}


def test_median_quartiles_and_cpu() -> None:
    found = latency.spread([(float(n), 10.0 * n) for n in range(1, 6)])
    assert found == {"median": 3.0, "low": 2.0, "high": 4.0, "cpu": 30.0}
    row = {"float": timed(4.0), "W8A8": timed(2.0)}
    assert latency.compared(row, "W8A8") == "2.00x [1.60-2.50], CPU 2.00x"
    assert latency.compared({"float": 4.0, "W8A8": 2.0}, "W8A8") == "2.00x"


def test_the_best_of_ours_beside_the_best_of_nncf() -> None:
    sizes = {"float": 80.0, "peer": 20.0, "W8A8": 20.0}
    row = {"float": timed(6.0), "peer": timed(3.0), "W8A8": timed(2.0), "OpenVINO W8A8": timed(1.5),
           "OpenVINO NNCF": timed(1.6), "OpenVINO NNCF, bf16": timed(1.5)}
    rows = {("deit", "megabytes"): {0: sizes}, ("deit", "batch 1, threads 1"): {0: row},
            ("old", "megabytes"): {0: sizes}, ("old", "batch 1, threads 1"): {0: {"float": 6.0, "W8A8": 3.0}}}
    table = latency.table(rows)  # type: ignore[arg-type]
    assert "| deit | 2.00 | 3.00 | 80.0 | 20.0 |" in table and "| old |  | 2.00 | 80.0 | 20.0 |" in table
    assert table.splitlines()[-1] == "| deit | 4.00 (4.00) |" and "(NNCF)" in table
    del rows["deit", "batch 1, threads 1"]
    assert "NNCF" not in latency.table(rows)  # type: ignore[arg-type]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    """The files that are there are not written again; NNCF's is not, and NNCF is missing."""
    def absent(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'nncf'", name="nncf")

    monkeypatch.setattr(latency, "quantize_nncf", absent)
    monkeypatch.setattr(latency, "version", lambda runtime: "1")
    monkeypatch.setattr(latency, "precision", lambda: "bf16")
    (tmp_path / "float.onnx").write_bytes(b"")
    found = latency.write_variants("deit_tiny", tmp_path, {"float", "OpenVINO float", "OpenVINO NNCF"})
    assert list(found) == ["float", "OpenVINO float", "OpenVINO float, bf16"]
    assert [each.precision for each in found.values()] == ["", "f32", ""]
    assert "OpenVINO NNCF is left out: nncf is not installed" in capsys.readouterr().out
