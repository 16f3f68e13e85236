"""The tables of the page on targets are those that the benchmark prints."""

from __future__ import annotations

from pathlib import Path

import results
import targets

PAGE = (Path(__file__).parents[2] / "docs/reference/targets.md").read_text(encoding="utf-8")
KEYS = ("sqnr_db", "codes", "free")


def made_up(**changes: object) -> dict[str, object]:
    values = {f"{name} {key}": 40.0 for name in ("ort", "openvino", "reference") for key in KEYS}
    return {**values, "quantization": 20.0, "saturated": 12.0, **changes}


def test_rows_say_what_was_measured() -> None:
    rows = {
        ("ViT", "W8A8"): {0: made_up(**{"ort sqnr_db": targets.EQUAL, "openvino codes": 0.0123})},
        ("ViT", "W4A4"): {0: made_up(precision="bf16", **{"unasked sqnr_db": 18.04})},
        ("ViT", "W7A8"): {0: {"quantization": 30.0, "saturated": targets.EQUAL}},
    }
    parity = targets.parity_table(rows).splitlines()
    assert parity[2] == "| ViT W8A8 | 20.0 | identical | 40.0000 | 40.0 | 0.0123 | 40.0 | 40.0000 | the same |"
    assert parity[3].endswith("| 18.0 (bf16) |") and len(parity) == 4
    assert len({line.count("|") for line in parity}) == 1
    assert targets.saturation_table(rows).splitlines()[2:] == [
        "| ViT W8A8 | 20.0 | 12.0 |", "| ViT W7A8 | 30.0 | identical |"]


def test_the_page_has_the_tables() -> None:
    rows: dict[results.Key, dict[int, results.Values]] = {}
    for (key, seed), row in results.load(results.FOLDER / "targets.json").items():
        rows.setdefault(key, {})[seed] = row.values
    for table in (targets.targets_table(), targets.parity_table(rows), targets.saturation_table(rows)):
        assert table in PAGE, table
