"""The report as one HTML page: data, style, script and the plotting library (plotly) inlined; it loads nothing.

The page draws in the browser, from the report and the summaries of `repquant_fx.statistics` that it carries as JSON. Every section is
left out where its data are missing, so a page can be made of less than a whole report.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata, resources
from string import Template
from typing import Any

import yaml

from repquant_fx.errors import InputError
from repquant_fx.version import VERSION

PACKAGES = ("torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "timm", "torchvision", "transformers")


def page(report: Mapping[str, Any], statistics: Mapping[str, Any] | None = None, *, command: str | None = None,
         title: str | None = None) -> str:
    """One self-contained page.

    Args:
        report: of `repquant_fx.report.build`, or any part of it. A layer needs `path` and `operator`; what else it has is shown.
        statistics: of `Statistics.to_dict`; without it the figures of single layers are left out.
        command: the command line to run again; a call of the Python API is shown where None.
        title: headline; the report's source where None.

    Raises:
        InputError: plotly is not installed.
    """
    plotly = plotly_script()
    heading = title or str(report.get("source") or "model")
    data = {
        "title": heading, "report": {k: v for k, v in report.items() if k not in ("layers", "recipe", "parity")},
        "parity": _parity(report.get("parity")), "layers": [_layer(entry) for entry in report.get("layers", ())],
        "statistics": statistics, "recipe": _recipe(report.get("recipe")), "reproduce": _reproduce(report, command),
        "versions": versions() if report.get("calibration") else {},
    }
    # `<` would let a name end the script element; JSON allows the escape anywhere a string may hold it
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(_read("template.html")).substitute(
        title=_escape(f"{heading} — repquant-fx"), version=VERSION, style=_read("style.css"), plotly=plotly, data=text, script=_read("report.js"))


def plotly_script() -> str:
    """The plotting library's JavaScript.

    Raises:
        InputError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("the HTML report needs plotly; install it with: pip install 'repquant-fx[report]'") from error
    return str(get_plotlyjs())


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that a result may depend on, and the machine."""
    found = {"repquant-fx": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"machine": f"{platform.system()} {platform.machine()}"}


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a layer; per-channel scales as their range."""
    inputs = []
    for item in entry.get("inputs", ()):
        scale, zero_point = item.get("scale"), item.get("zero_point")
        if isinstance(scale, list):
            item = {**item, "scale": [min(scale), max(scale)], "zero_point": [min(zero_point), max(zero_point)] if zero_point else None}
        inputs.append(item)
    return {**{k: v for k, v in entry.items() if k != "inputs"}, "inputs": inputs}


def _parity(parity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if parity is None:
        return None
    quantizers = parity.get("quantizers", {})
    return {**{k: v for k, v in parity.items() if k != "quantizers"}, "compared": len(quantizers),
            "worst_share": max((q["share_step"] for q in quantizers.values()), default=0.0)}


def _recipe(recipe: Mapping[str, Any] | None) -> str | None:
    return yaml.safe_dump(dict(recipe), sort_keys=False) if recipe is not None else None


def _reproduce(report: Mapping[str, Any], command: str | None) -> dict[str, str] | None:
    calibration = report.get("calibration")
    if command is not None:
        return {"language": "shell", "text": command}
    if not calibration:
        return None
    return {"language": "python", "text": "\n".join((
        "from repquant_fx import Recipe, compile", "",
        f"# calibration: {calibration.get('origin')}; {calibration.get('samples')} samples, {calibration.get('held_back')} held back",
        f"compiled = compile(model, Recipe.from_file(\"recipe.yaml\"), calibration=calibration, seed={calibration.get('seed', 0)}, statistics=True)",
        "compiled.save(\"model.onnx\", html=\"report.html\")"))}


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
