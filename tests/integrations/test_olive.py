"""The pass of Olive, in a workflow of Olive's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compiled import PLAIN
from language import LINES, save

pytest.importorskip("olive", reason="pip install 'repquant-fx[olive]'")
from repquant_fx.integrations.olive import package_config


def test_a_workflow_quantizes_a_model(tmp_path: Path, monkeypatch: Any) -> None:
    from olive.workflows import run

    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    monkeypatch.chdir(tmp_path)
    save("bert", tmp_path / "bert", with_tokenizer=True)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    config = {
        "input_model": {"type": "HfModel", "model_path": str(tmp_path / "bert"), "task": "text-classification"},
        "passes": {"quantize": {"type": "RepQuant", "calibration": str(tmp_path / "text.txt"), "recipe": PLAIN,
                                "wbits": 4, "samples": 16}},
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    run(config, package_config=package_config())
    written = {path.name: path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"model.onnx", "config.json", "report.json"} <= set(written)
    report = json.loads(written["report.json"].read_text())
    assert report["recipe"]["wbits"] == 4 and report["recipe"]["gptq"] is False


def test_the_pass_is_beside_those_of_olive() -> None:
    passes = package_config()["passes"]
    assert "OnnxStaticQuantization" in passes and passes["RepQuant"]["module_path"].endswith("olive.RepQuant")
