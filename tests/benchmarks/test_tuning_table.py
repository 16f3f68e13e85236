"""The table of the tuning benchmark, from made-up rows."""

from __future__ import annotations

from typing import Any

from tuning import table


def test_the_table_has_what_was_accepted() -> None:
    start: dict[str, Any] = {"sqnr_db": 40.0, "file_bytes": 1}
    lost = {"forms": ["softmax uniform", "float head"], "median": 1.3, "low": 1.2, "high": 1.4, "sqnr_db": 30.0,
            "accepted": False}
    taken = {"forms": ["softmax uniform"], "median": 1.2, "low": 1.19, "high": 1.21, "sqnr_db": 39.5, "accepted": True}
    rows: Any = {
        ("deit_small", "ort-cpu", "threads 1"): {0: {"attempts": [lost, taken], "start": start, "quick": start}},
        ("opt", "openvino", "threads 1"): {0: {"attempts": [lost], "start": start, "quick": start}},
        ("llama", "ort-cpu", "threads 2"): {0: {"attempts": [], "start": None, "quick": {"sqnr_db": None}}},
    }
    assert table(rows).splitlines()[2:] == [
        "| deit_small ort-cpu threads 1 | softmax uniform | 1.20 [1.19-1.21] | 40.0 | 39.5 |",
        "| opt openvino threads 1 | nothing | 1.00 | 40.0 | 40.0 |",
        "| llama ort-cpu threads 2 | nothing | 1.00 | none | none |",
    ]
