"""Mixed precision beside uniform bits at equal size, under ONNX Runtime: the table of docs/benchmarks.md.

    python benchmarks/mixed_precision.py --calib train_folder --data test_folder \\
        --minilm FOLDER --sts stsb-en-dev.csv --text wiki.test.raw --results benchmarks/results/mixed_precision.json

For each mean number of bits: all layers with these bits, and bits searched; of activations too where their mean is
below 8. Size is that of the weights as information (2 and 3 bits are stored as 4 in the file). Bits are out of 2, 3, 4,
6 and 8. The search sees the calibration samples alone, and its result is not tried beside uniform bits (`trial=False`):
what is printed is measured on the test data, from the exported file. Several `--seeds` draw other calibration data
each, and give mean and standard deviation. Rows that `--results` already holds for the same commit are not run again
(`results.py`).
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import MODELS, Bench, onnx_predictor
from language_accuracy import Similarity
from results import Key, Results, Values, add_options, cell, mean_and_spread
from torch import Tensor

from repquant_fx import Recipe, compile
from repquant_fx.compiled import CompiledModel
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.sensitivity import LOSSES, Sensitivity, search, sensitivity

CHOICES = (2, 3, 4, 6, 8)
BITS = [(3, 8), (4, 4), (3, 3)]  # with 8-bit activations those stay uniform: nearly all damage is the weights'
UNIFORM, SEARCHED = "uniform", "searched"


class Images:
    """Top-1 of a classifier in percent, and SQNR of its logits, over a folder."""

    metric = "top-1 %"

    def __init__(self, loaded: LoadedModel, calib: str, data: str, samples: int, seed: int) -> None:
        self.loaded, self.batch_size = loaded, 32
        self.bench = Bench("", loaded, calib, data, samples, seed)
        self.calibration = self.bench.calibration

    def float_score(self) -> float:
        return 100 * float((self.bench.float_logits.argmax(1) == self.bench.labels).double().mean())

    def measure(self, compiled: CompiledModel) -> dict[str, float]:
        found = self.bench.measure(onnx_predictor(compiled.session(torch.get_num_threads())))
        return {"score": found["top1"], "sqnr_db": found["sqnr_db"], "agreement": found["agreement"]}


class Sentences:
    """Spearman correlation on sentence pairs, and SQNR of the outputs of their tokens."""

    metric = "Spearman x 100"

    def __init__(self, loaded: LoadedModel, pairs: Path, text: Path, samples: int, seed: int) -> None:
        self.loaded, self.batch_size = loaded, 16
        self.bench = Similarity(loaded, pairs, text, samples, seed)
        self.calibration = self.bench.calibration
        self.expected: list[Tensor] = []

    def float_score(self) -> float:
        def predict(ids: Tensor, mask: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = next(iter(self.loaded.module(input_ids=ids, attention_mask=mask).values()))
            self.expected.append(hidden * mask[..., None])
            return hidden

        self.expected = []
        return self.bench.measure(predict)

    def measure(self, compiled: CompiledModel) -> dict[str, float]:
        if not self.expected:
            self.float_score()
        session, expected = compiled.session(torch.get_num_threads()), iter(self.expected)
        signal = noise = 0.0

        def predict(ids: Tensor, mask: Tensor) -> Tensor:
            nonlocal signal, noise
            hidden, reference = (
                torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]),
                next(expected),
            )
            signal += float(reference.square().sum())
            noise += float((hidden * mask[..., None] - reference).square().sum())
            return hidden

        return {"score": self.bench.measure(predict), "sqnr_db": 10 * float(np.log10(signal / noise))}


METRICS = {**dict.fromkeys(MODELS, Images.metric), "MiniLM-L6": Sentences.metric}


def run_all(name: str, bench: Any, results: Results, only: str | None, seed: int, loss: str) -> None:
    """Measure every row of a model. Long because its steps share one sensitivity analysis."""
    count = len(bench.calibration["input_ids"] if isinstance(bench.calibration, dict) else bench.calibration)
    source = {"calibration": bench.calibration, "samples": count, "batch_size": bench.batch_size, "seed": seed}
    analysed: dict[bool, Sensitivity] = {}

    def row(label: str, run: Callable[[], dict[str, Any]]) -> None:
        if only and not re.search(only, label):
            return
        found, new = results.measure((name, label), seed, run)
        if new:
            figures = " ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
            print(f"{name:10s} seed {seed} {label:50s} {figures}", flush=True)

    def compiled(chosen: Recipe, **about: Any) -> dict[str, Any]:
        start = time.perf_counter()
        result = compile(bench.loaded, recipe=chosen, check=False, **source)
        seconds = time.perf_counter() - start
        return {
            **bench.measure(result),
            "compile_seconds": seconds,
            "file_megabytes": result.report["file_bytes"] / 1e6,
            **about,
        }

    def analyse(activations: bool) -> Sensitivity:
        if activations not in analysed:
            start = time.perf_counter()
            analysed[activations] = sensitivity(
                bench.loaded,
                recipe=Recipe(wbits=4, abits=4 if activations else 8),
                weight_choices=CHOICES,
                activation_choices=CHOICES if activations else None,
                loss=loss,
                **source,
            )
            print(f"{name:10s} sensitivity: {time.perf_counter() - start:.0f} s", flush=True)
        return analysed[activations]

    def searched(w: int, a: int) -> dict[str, Any]:
        found = search(
            bench.loaded,
            sensitivity=analyse(a < 8),
            target_size=f"{w}b",
            count="information",
            choices=CHOICES,
            activation_choices=CHOICES,
            mean_abits=a if a < 8 else None,
            trial=False,  # both are measured here
        )
        print(found, flush=True)
        return compiled(
            found.recipe,
            weight_kilobytes=found.weight_bytes / 1e3,
            bits_per_weight=found.bits_per_weight,
            mean_abits=found.mean_abits,
            loss=loss,
            predicted=found.predicted,
            recipe=found.recipe.to_dict(),
        )

    row("float", lambda: {"score": bench.float_score()})
    for w, a in BITS:
        row(f"{UNIFORM} W{w}A{a}", lambda w=w, a=a: compiled(Recipe(wbits=w, abits=a)))  # type: ignore[misc]
        row(f"{SEARCHED} W{w}A{a}", lambda w=w, a=a: searched(w, a))  # type: ignore[misc]


def table(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: one row for each mean number of bits and way, columns for each model; sizes of all weights below its
    name. Mean and spread over the seeds.
    """
    names = list(dict.fromkeys(name for name, _ in rows))
    lines = ["| mean bits | | " + " | ".join(f"{n} {METRICS[n]} | {n} SQNR dB" for n in names) + " |",
             "|---|---|" + "---:|---:|" * len(names),
             "| float | | " + " | ".join(f"{cell(rows.get((n, 'float')), 'score')} | " for n in names) + " |"]
    for w, a in BITS:
        searched = [rows.get((name, f"{SEARCHED} W{w}A{a}")) for name in names]
        sizes = [f"{mean_and_spread(found, 'weight_kilobytes')[0]:.0f}" if found else "–" for found in searched]
        for label in (UNIFORM, SEARCHED):
            found = [rows.get((name, f"{label} W{w}A{a}")) for name in names]
            cells = [f"{cell(r, 'score')} | {cell(r, 'sqnr_db')}" for r in found]
            lines.append(f"| W{w}A{a} ({' / '.join(sizes)} kB) | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", help="image folder to calibrate with")
    parser.add_argument("--data", help="class folders to evaluate on")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    for name in ("minilm", "sts", "text"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--samples", type=int, default=256, help="images (default 256)")
    parser.add_argument("--lines", type=int, default=64, help="lines of text (default 64)")
    parser.add_argument("--loss", choices=LOSSES, default="error", help="that the search minimises")
    parser.add_argument("--only", help="rows whose label this regular expression finds")
    add_options(parser, "mixed_precision.json")
    args = parser.parse_args()
    settings = {"images": args.samples, "lines": args.lines, "loss": args.loss}
    results = Results(args.results, settings, args.keep)
    if args.calib and args.data:
        for name in args.models:
            loaded = load_model(MODELS[name])
            for seed in args.seeds:
                images = Images(loaded, args.calib, args.data, args.samples, seed)
                run_all(name, images, results, args.only, seed, args.loss)
    if args.minilm and args.sts and args.text:
        loaded = load_model(args.minilm, task="feature-extraction")
        for seed in args.seeds:
            sentences = Sentences(loaded, args.sts, args.text, args.lines, seed)
            run_all("MiniLM-L6", sentences, results, args.only, seed, args.loss)
    print(table(results.rows()))


if __name__ == "__main__":
    main()
