"""`--html`: one self-contained page, whatever is known; nothing else changes."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import inputs
from helpers import vit

from repquant_fx import CompiledModel, InputError, Recipe, compile
from repquant_fx.cli import main

pytest.importorskip("plotly", reason="the page needs plotly: pip install '.[report]'")

from repquant_fx import html as pages
from repquant_fx.inspection import inspect
from repquant_fx.report import summary

RECIPE = Recipe(wbits=4, abits=4)


@pytest.fixture(scope="module")
def result() -> CompiledModel:
    return compile(vit(), inputs("vit"), RECIPE, batch_size=8, statistics=True)


@pytest.fixture(scope="module")
def folder(result: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    result.save(folder / "model.onnx", html=folder / "page.html", report=folder / "report.json")
    torch.export.save(
        torch.export.export(vit(depth=1), (inputs("vit", 2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)),
        folder / "model.pt2",
    )
    np.save(folder / "calib.npy", inputs("vit", 24).numpy())
    return folder


class Loads(HTMLParser):
    """Collects what a browser would fetch, and the JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.data, self._inside = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[k]) for k in ("src", "srcset") if values.get(k)]
        if tag == "link" and values.get("href"):
            self.fetched.append(str(values["href"]))
        self._inside = values.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def parsed(text: str) -> tuple[dict[str, Any], list[str]]:
    reader = Loads()
    reader.feed(text)
    return json.loads(reader.data), reader.fetched


def test_everything_is_in_the_page(folder: Path, result: CompiledModel) -> None:
    text = (folder / "page.html").read_text()
    data, fetched = parsed(text)
    assert not [f for f in fetched if not f.startswith("data:")]
    ours = text[text.rindex("<script"):]
    assert (
        not re.search(r"fetch\(|XMLHttpRequest|import\(|https?://", ours)
        and "@import" not in text[: text.index("<script")]
    )
    assert len(data["layers"]) == len(result.report["layers"])
    kinds = {entry.get("kind") for entry in data["statistics"]["activations"].values()}
    assert {"channels", "probabilities", "values"} <= kinds
    norms = [e for e in data["statistics"]["activations"].values() if e.get("kind") == "channels"]
    assert len(norms) == 7 and all(n["after"]["span"] <= n["before"]["span"] for n in norms)
    assert all(w["chosen"]["output"] <= 1.0001 * w["nearest"]["output"] for w in data["statistics"]["weights"].values())
    assert "wbits: 4" in data["recipe"] and "compile(" in data["reproduce"] and data["versions"]["torch"]


def test_the_model_is_the_same(result: CompiledModel) -> None:
    assert compile(vit(), inputs("vit"), RECIPE, batch_size=8).to_bytes() == result.to_bytes()


def test_names_cannot_end_the_script(result: CompiledModel) -> None:
    evil = "</script><script>alert(1)</script><!--"
    report = {**result.report, "source": evil, "layers": [{**result.report["layers"][0], "path": evil}]}
    text = pages.page(report)
    data, _ = parsed(text)
    assert data["layers"][0]["path"] == data["layers"][0]["label"] == data["source"] == evil and evil not in text


def test_inspected_files_and_models(
    folder: Path, result: CompiledModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = result.report["layers"]
    for source, compiled in (("model.onnx", True), ("model.pt2", False)):
        out = folder / f"{source}.html"
        assert main(["inspect", str(folder / source), "--html", str(out), "--quiet"]) == 0
        data, fetched = parsed(out.read_text())
        assert not fetched and data["report"]["compiled"] is compiled
        assert out.stat().st_size > 1_000_000  # figures of the sites, with the plotting library
        about = data["report"]
        if compiled:
            assert about["weighted_layers"] == sum("weight" in layer for layer in layers)
            assert about["products"] == len(layers) - about["weighted_layers"] and about["target"] == "ort-cpu"
            counts = f"{about['weighted_layers']} weighted layers and {about['products']} products"
            assert counts in summary(result.report)
        assert len(data["sites"]) == len(inspect(folder / source).rows) if compiled else data["sites"]
    assert capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "plotly.offline", None)  # without it the page has no figures
    assert main(["inspect", str(folder / "model.onnx"), "--html", str(out), "--force", "--quiet"]) == 0
    assert out.stat().st_size < 1_000_000


def test_inspection_with_a_report(folder: Path, result: CompiledModel, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of a compile, later."""
    arguments = ["inspect", str(folder / "model.onnx"), "--quiet", "--json"]
    assert main([*arguments, "--html", str(folder / "later.html"), "--report", str(folder / "report.json")]) == 0
    data, _ = parsed((folder / "later.html").read_text())
    assert data["statistics"] == result.statistics and len(data["layers"]) == len(result.report["layers"])
    assert main([*arguments, "--report", str(folder / "report.json")]) == 2
    (folder / "none.json").write_text("[]")
    assert main([*arguments, "--html", str(folder / "none.html"), "--report", str(folder / "none.json")]) == 2
    assert not (folder / "none.html").exists() and "not a report" in capsys.readouterr().err


def test_names_people_tell_apart(folder: Path) -> None:
    data, _ = parsed((folder / "page.html").read_text())
    labels = [layer["label"] for layer in data["layers"]]
    assert len(set(labels)) == len(labels) and "blocks.0.attn (query × key)" in labels
    assert data["title"] == "VisionTransformer in memory"
    for source, title in (
        ("timm:vit_tiny_patch16_224,depth=1 with the weights of /a/b/w.safetensors", "w.safetensors"),
        ("LlamaForCausalLM of models/llama/", "llama"),
        ("timm:deit_small,num_classes=3", "timm:deit_small"),
        ("BertModel of hf:owner/name", "hf:owner/name"),
    ):
        assert pages._headline(source) == title


def test_command_line(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "repquant_fx",
        "compile",
        str(folder / "model.pt2"),
        "--out",
        str(folder / "cli.onnx"),
        "--html",
        str(folder / "cli.html"),
        "--calib",
        str(folder / "calib.npy"),
        "--wbits",
        "4",
        "--no-correction",
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data, _ = parsed((folder / "cli.html").read_text())
    assert "--html" in data["reproduce"] and "--no-correction" in data["reproduce"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "--force" in again.stderr


@pytest.mark.parametrize("out, page", [("same.html", "same.html"), ("model.onnx", "report.json")])
def test_two_outputs_of_one_name(folder: Path, out: str, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compile",
        str(folder / "model.pt2"),
        "--out",
        str(folder / "new.onnx"),
        "--html",
        str(folder / page),
        "--report",
        str(folder / page),
        "--force",
    ]
    assert main(arguments) == 2 and "same file" in capsys.readouterr().err


def test_without_plotly(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match="pip install"):
        pages.plotly_script()
    out = folder / "never.onnx"
    assert main(["compile", str(folder / "model.pt2"), "--out", str(out), "--html", str(folder / "never.html")]) == 2
    assert "pip install" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("width, height", [(390, 844), (1440, 900)])
def test_in_a_browser(folder: Path, width: int, height: int) -> None:
    """No error, no request, no sideways scrolling, figures drawn; a softmax layer chosen."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    import shutil

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options)
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(f"file://{folder / 'page.html'}")
        driver.execute_script(
            "const s = document.querySelector('select'); s.selectedIndex = [...s.options].findIndex(o => "
            "o.text.includes('matrix')); s.dispatchEvent(new Event('change'))"
        )
        drawn = driver.execute_script(
            "return [document.querySelectorAll('.js-plotly-plot').length, document.documentElement.scrollWidth, "
            "document.querySelectorAll('.problem').length]"
        )
        widths = driver.execute_script(
            "return [...document.querySelector('.js-plotly-plot').querySelectorAll('.bars .point path')]"
            ".map(p => p.getBoundingClientRect().width)"
        )
        assert (
            len(widths) == len(json.loads((folder / "report.json").read_text())["layers"])
            and max(widths) - min(widths) < 1
        )
        assert drawn[0] >= 3 and drawn[1] <= width and drawn[2] == 0
        arguments = ["inspect", str(folder / "model.onnx"), "--html", str(folder / "i.html"), "--force", "--quiet"]
        assert main(arguments) == 0
        driver.get(f"file://{folder / 'i.html'}")
        assert driver.execute_script("return document.querySelectorAll('#sizes.js-plotly-plot, #scales .bars, "
                                     "#scales.js-plotly-plot').length") == 2
        assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
        requests = [m for m in (json.loads(e["message"])["message"] for e in driver.get_log("performance"))
                    if m["method"] == "Network.requestWillBeSent" and m["params"]["request"]["url"].startswith("http")]
        assert requests == []
    finally:
        driver.quit()
