"""Calibration without data: noise, what the compiler synthesises from the model, and real images, side by side.

    python benchmarks/data_free.py --calib train_folder --data test_folder --results benchmarks/results/data_free.json
    python benchmarks/data_free.py --weights dinov2_cifar10.safetensors --calib train_folder --data test_folder

Without `--weights` the two committed models are measured. Noise is what the compiler used to make up, standard normal;
`synthesised` is what it does without `--calib`. Top-1 and SQNR of the logits are of the exported file under ONNX
Runtime, on `--images` test images. Several `--seeds` draw other calibration images each, and give mean and standard
deviation. Rows that `--results` already holds for the same commit are not run again (`results.py`).
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import MODELS, onnx_predictor
from results import Results, accuracy_table, add_options
from torch import Tensor

from repquant_fx import Recipe, compile
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import RepQuantWarning
from repquant_fx.evaluation import labelled_folder
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.parity import sqnr

BITS = [(8, 8), (4, 4)]


class Bench:
    """A classifier with the images that it is measured on, and data to calibrate it with."""

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace, seed: int) -> None:
        self.loaded, self.samples, self.seed = loaded, options.samples, seed
        shape = tuple(loaded.example_inputs[0].shape[1:])
        self.images = list(labelled_folder(options.data, loaded.preprocessing, shape, 50, options.images, 0))
        self.labels = torch.cat([labels for _, labels in self.images])
        assert loaded.module is not None
        with torch.inference_mode():
            self.expected = torch.cat([loaded.module(x) for x, _ in self.images])
        spec = InputSpec("x", (None, *shape), torch.float32)
        real = load_calibration(options.calib, [spec], preprocessing=loaded.preprocessing, samples=self.samples,
                                seed=self.seed)
        noise = torch.randn(self.samples, *shape, generator=torch.Generator().manual_seed(self.seed))
        self.data: dict[str, Tensor | None] = {
            "noise": noise, "synthesised": None, "real": torch.cat([batch[0] for batch in real.batches])
        }

    def score(self, logits: Tensor) -> dict[str, float]:
        return {"top1": 100 * float((logits.argmax(1) == self.labels).double().mean()),
                "sqnr_db": min(sqnr(logits, self.expected), 999.0)}

    def compiled(self, kind: str, wbits: int, abits: int) -> dict[str, Any]:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RepQuantWarning)
            result = compile(self.loaded, self.data[kind], Recipe(wbits=wbits, abits=abits), samples=self.samples,
                             seed=self.seed, check=False)
        seconds = time.perf_counter() - start
        predict = onnx_predictor(result.session(torch.get_num_threads()))
        return {**self.score(torch.cat([predict(x) for x, _ in self.images])), "compile_seconds": seconds,
                "calibration_seconds": result.report["seconds"]["calibration data"]}


def run_all(name: str, bench: Bench, results: Results) -> None:
    labels = {f"{kind} W{w}A{a}": (kind, w, a) for w, a in BITS for kind in bench.data}
    for label in ("float", *labels):
        run = partial(bench.score, bench.expected) if label == "float" else partial(bench.compiled, *labels[label])
        found, new = results.measure((name, label), bench.seed, run)
        if new:
            figures = " ".join(f"{k} {v:.2f}" for k, v in found.items())
            print(f"{name:8s} seed {bench.seed} {label:18s} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", help="image folder to calibrate with")
    parser.add_argument("--data", help="class folders to evaluate on")
    parser.add_argument("--weights", type=Path, help="another model's weights")
    parser.add_argument("--arch", help="its architecture, timm:NAME,...; of a safetensors file that does not say")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000, help="test images (default 1000)")
    add_options(parser, "data_free.json")
    options = parser.parse_args()
    results = Results(options.results, {"samples": options.samples, "images": options.images}, options.keep)
    if options.calib and options.data:
        for name, path in ({options.weights.stem: options.weights} if options.weights else MODELS).items():
            for seed in options.seeds:
                run_all(name, Bench(load_model(path, arch=options.arch), options, seed), results)
    print(accuracy_table(results.rows()))


if __name__ == "__main__":
    main()
