"""What block reconstruction and rotations gain on the committed models, under ONNX Runtime, on all test images.

    python benchmarks/reconstruction.py --calib train_folder --data test_folder

Several `--seeds` draw other calibration images each, and give mean and standard deviation. Rows that `--results`
already holds for the same commit are not run again (`results.py`).
"""

from __future__ import annotations

import argparse
from typing import Any

from accuracy import MODELS, Bench
from results import Key, Results, Values, add_options, cell

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", required=True, help="image folder to calibrate with")
    parser.add_argument("--data", required=True, help="class folders to evaluate on")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--only", default="", help="rows whose label contains this text")
    add_options(parser, "reconstruction.json")
    options = parser.parse_args()
    results = Results(options.results, {"samples": options.samples, "steps": STEPS}, options.keep)
    for name, path in MODELS.items():
        loaded = load_model(path)
        for seed in options.seeds:
            bench = Bench(name, loaded, options.calib, options.data, options.samples, seed)
            results.measure((name, "float"), seed, lambda bench=bench: bench.measure(bench.as_float))
            for w, a in BITS:
                for method, settings in METHODS.items():
                    label = f"W{w}A{a} {method}"
                    if options.only not in f"{name} {label}":
                        continue
                    recipe = Recipe(wbits=w, abits=a, **settings)
                    found, new = results.measure((name, label), seed, lambda b=bench, r=recipe: b.compiled(r))
                    if new:
                        print(name, label, f"seed {seed}", {key: round(value, 2) for key, value in found.items()},
                              flush=True)
    print(table(results.rows()))


def table(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: a row per method and width, two columns per model; mean and spread over the seeds."""
    header = " | ".join(f"{name} top-1 % | {name} SQNR dB" for name in MODELS)
    lines = [f"| | {header} |", "|---|" + "---:|---:|" * len(MODELS)]
    lines.append("| float | " + " | ".join(f"{cell(rows.get((name, 'float')), 'top1')} | " for name in MODELS) + " |")
    for w, a in BITS:
        for method in METHODS:
            found = [rows.get((name, f"W{w}A{a} {method}")) for name in MODELS]
            cells = [f"{cell(r, 'top1')} | {cell(r, 'sqnr_db')}" for r in found]
            lines.append(f"| W{w}A{a} {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
