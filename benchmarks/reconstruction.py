"""What block reconstruction and rotations gain on the committed models, under ONNX Runtime, on all test images.

    python benchmarks/reconstruction.py --calib train_folder --data test_folder

Rows that `--results` already holds for the same commit are not run again; those of another commit are dropped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from accuracy import HERE, MODELS, Bench

from repquant_fx import Recipe
from repquant_fx.frontends.loading import load_model

STEPS = 400
BITS = [(4, 4), (3, 3)]
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "reconstructed": {"reconstruct": STEPS},
    "rotated": {"rotate": ("residual", "heads")},
    "rotated and reconstructed": {"rotate": ("residual", "heads"), "reconstruct": STEPS},
}


def commit() -> str:
    """The checked-out commit, with a mark where files differ from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", required=True, help="image folder to calibrate with")
    parser.add_argument("--data", required=True, help="class folders to evaluate on")
    parser.add_argument("--results", type=Path, default=HERE / "results/reconstruction.json")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose label contains this text")
    options = parser.parse_args()
    about = {"commit": commit(), "samples": options.samples, "seed": options.seed, "torch": torch.__version__,
             "onnxruntime": onnxruntime.__version__, "steps": STEPS}
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    rows: dict[str, Any] = results["rows"] if results.get("about") == about else {}
    for name, path in MODELS.items():
        bench = Bench(name, load_model(path), options.calib, options.data, options.samples, options.seed)
        top1 = 100 * float((bench.float_logits.argmax(1) == bench.labels).double().mean())
        rows.setdefault(f"{name} float", {"top1": top1})
        for w, a in BITS:
            for method, settings in METHODS.items():
                label = f"{name} W{w}A{a} {method}"
                if label not in rows and options.only in label:
                    rows[label] = bench.compiled(Recipe(wbits=w, abits=a, **settings))
                    options.results.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
                    print(label, {key: round(value, 2) for key, value in rows[label].items()}, flush=True)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """Markdown: a row per method and width, two columns per model."""
    header = " | ".join(f"{name} top-1 % | {name} SQNR dB" for name in MODELS)
    lines = [f"| | {header} |", "|---|" + "---:|---:|" * len(MODELS)]
    lines.append("| float | " + " | ".join(f"{rows[f'{name} float']['top1']:.2f} | " for name in MODELS) + " |")
    for w, a in BITS:
        for method in METHODS:
            cells = [rows.get(f"{name} W{w}A{a} {method}") for name in MODELS]
            lines.append(f"| W{w}A{a} {method} | "
                         + " | ".join(f"{c['top1']:.2f} | {c['sqnr_db']:.2f}" if c else " | " for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
