"""The report as one HTML page: data, style, script and the plotting library (plotly) inlined; it loads nothing.

The page draws in the browser, from the report and the summaries of `repquant_fx.statistics` that it carries as JSON.
Every section is left out where its data are missing, so a page can be made of less than a whole report.
"""

from __future__ import annotations

import html
import json
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata, resources
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from repquant_fx.errors import InputError
from repquant_fx.naming import site_operand
from repquant_fx.security.escape import printable
from repquant_fx.version import VERSION

if TYPE_CHECKING:
    from repquant_fx.inspection import Inspection

PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "timm",
    "torchvision",
    "transformers",
)


def page(report: Mapping[str, Any], statistics: Mapping[str, Any] | None = None, *, command: str | None = None) -> str:
    """The page of a compiled model.

    Args:
        report: of `repquant_fx.report.build`, or any part of it. A layer needs `path` and `operator`; what else it has
            is shown.
        statistics: of `Statistics.to_dict`; without it the figures of single layers are left out.
        command: the command line to run again; a call of the Python API is shown where None.

    Raises:
        InputError: plotly is not installed.
    """
    lost = [product for product in report.get("kernels") or () if not product["integer"]]
    return _fill({
        "report": {k: v for k, v in report.items() if k not in ("layers", "recipe", "parity", "kernels")},
        "parity": _parity(report.get("parity")), "layers": [_layer(entry) for entry in report.get("layers", ())],
        "products": len(report["kernels"]) if report.get("kernels") is not None else None,
        "lost": [{"path": item["path"], "operator": item["op"], "reason": item["reason"]} for item in lost],
        "statistics": statistics, "recipe": _recipe(report.get("recipe")), "reproduce": _reproduce(report, command),
        "versions": versions() if report.get("calibration") else {},
    }, str(report.get("source") or "model"))


def _headline(source: str) -> str:
    """A source in a few words: the name of its file or directory, or the architecture without its options."""
    match = re.search(r"(?:with the weights of|pickled in| of) (\S+)$", source)
    name = match.group(1) if match else source
    return name.rstrip("/").rpartition("/")[2] if "/" in name and not name.startswith("hf:") else name.split(",")[0]


def inspection_page(inspection: Inspection, *, command: str) -> str:
    """The page of a file that was compiled before, or of what would be matched in a model that is not compiled yet.
    Nothing was measured.

    Args:
        command: the command line that made the page.

    Without plotly the figures are left out.
    """
    about, audited = inspection.about, [row for row in inspection.rows if row.integer is not None]
    file = shlex.quote(inspection.source)
    again = (f"repquant-fx recipe show {file} > recipe.yaml\n"
             f"repquant-fx compile MODEL --calib DATA --recipe {file} --out again.onnx")
    return _fill(
        {
            "report": {
                "source": inspection.source,
                "left_alone": inspection.left_alone,
                "repquant_fx": about.get("version"),
                "compiled": inspection.compiled,
                **{k: v for k, v in about.items() if k not in ("recipe", "version")},
            },
            "sites": [_ranges(asdict(row)) for row in inspection.rows],
            "layers": [],
            "products": len(audited) if audited else None,
            "lost": [
                {"path": row.site, "operator": row.kind, "reason": row.reason} for row in audited if not row.integer
            ],
            "recipe": _recipe(about.get("recipe")),
            "reproduce": again if inspection.compiled else command,
        },
        inspection.source,
    )


def _fill(data: Mapping[str, Any], heading: str) -> str:
    """The template with everything in it."""
    # `<` would let a name end the script element; JSON allows the escape anywhere a string may hold it
    text = json.dumps(
        {"title": _headline(heading), "source": heading, **data}, separators=(",", ":"), allow_nan=False
    ).replace("<", "\\u003c")
    return Template(_read("template.html")).substitute(
        title=html.escape(printable(f"{_headline(heading)} — repquant-fx")), version=VERSION,
        style=_read("style.css"), plotly=_library(data), data=text, script=_read("report.js"))


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


def _library(data: Mapping[str, Any]) -> str:
    """The plotting library where there is something to draw; a page of sites is worth reading without it, too."""
    if data["layers"]:
        return plotly_script()
    try:
        return plotly_script() if data.get("sites") else ""
    except InputError:
        return ""


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that a result may depend on, and the machine."""
    installed = {"repquant-fx": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed | {"machine": f"{platform.system()} {platform.machine()}"}


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a layer; the two products of an attention are told apart by their operands."""
    operands = [site_operand(str(item.get("name", ""))) for item in entry.get("inputs", ())]
    label = entry.get("path") or entry.get("node") or "?"
    label = f"{label} ({' × '.join(operands)})" if entry.get("group") == "matmul" and len(operands) > 1 else label
    return {**entry, "label": label, "inputs": [_ranges(item) for item in entry.get("inputs", ())]}


def _ranges(item: Mapping[str, Any]) -> dict[str, Any]:
    """With per-channel scales and zero points as their range."""
    return {
        k: [min(v), max(v)] if k in ("scale", "zero_point") and isinstance(v, list) and v else v
        for k, v in item.items()
    }


def _parity(parity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if parity is None:
        return None
    quantizers = parity.get("quantizers", {})
    return {**{k: v for k, v in parity.items() if k != "quantizers"}, "compared": len(quantizers),
            "worst_share": max((q["share_step"] for q in quantizers.values()), default=0.0)}


def _recipe(recipe: Mapping[str, Any] | None) -> str | None:
    return yaml.safe_dump(dict(recipe), sort_keys=False) if recipe is not None else None


def _reproduce(report: Mapping[str, Any], command: str | None) -> str | None:
    calibration = report.get("calibration")
    if command is not None or not calibration:
        return command
    count = calibration.get("samples", 0) + calibration.get("held_back", 0)
    return "\n".join(
        (
            "from repquant_fx import Recipe, compile",
            "",
            f"# calibration data: {calibration.get('origin')}",
            f'compiled = compile(model, calibration, Recipe.from_file("recipe.yaml"), samples={count}, '
            f'seed={calibration.get("seed", 0)}, '
            "statistics=True)",
            'compiled.save("model.onnx", html="report.html")',
        )
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
