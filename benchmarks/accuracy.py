"""Accuracy of quantized models under ONNX Runtime, beside float and peers: the tables of docs/benchmarks.md.

    python benchmarks/accuracy.py --calib train_folder --data test_folder --results benchmarks/results/accuracy.json

Without `--weights` the two committed models (trained on CIFAR-10 by `train_cifar.py`) are measured. With
`--weights FILE --arch timm:NAME` any classifier and any pair of class folders, ImageNet for instance.

Rows: float; ONNX Runtime's own `quantize_static` at W8A8, and NNCF for OpenVINO where both are installed; RepQ-ViT;
RepQuant as published; RepQuant as it is by default here; then, at two bit widths, the ablations of the paper's Tables
VII to X, what this compiler adds to the paper, and the model with planted inter-channel variation. Every number is
measured on all images of `--data`, executed by ONNX Runtime from the exported file. SQNR is that of the logits against
the float model's, over all images. Several `--seeds` draw other calibration images each, and give mean and standard
deviation. Rows that `--results` already holds for the same commit are not run again (`results.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from latency_peers import quantize_nncf
from results import Key, Results, Values, accuracy_table, add_options
from torch import Tensor

from repquant_fx import Recipe, compile, repq_vit, session
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.evaluation import labelled_folder
from repquant_fx.frontends.capture import capture
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.parity import sqnr
from repquant_fx.passes.base import run_pass
from repquant_fx.passes.match_sites import MatchSites
from repquant_fx.passes.normal_form import normalize as normal_form
from repquant_fx.recipe import EQUALIZE
from repquant_fx.runtimes import OPENVINO_FLOAT32, import_openvino

HERE = Path(__file__).parent
MODELS = {"ViT": HERE / "weights/vit_cifar10.safetensors", "Swin": HERE / "weights/swin_cifar10.safetensors"}
BITS = [(8, 8), (6, 6), (4, 8), (4, 4), (3, 3), (2, 4)]
ABLATED = [(4, 4), (3, 3)]
# what this compiler adds to the paper, each as it is turned off
PARTS: dict[str, dict[str, Any]] = {
    "output correction": {"correction": False},
    "rotations": {"rotate": ()},
    "balance": {"balance": False},
    "normalized rows": {"normalize_rows": False},
    "affine of activations": {"activation_affine": False},
}
NAME = "x"  # of the input in peers' files


def published(wbits: int, abits: int) -> Recipe:
    """RepQuant with the parts of the paper alone."""
    return Recipe(wbits=wbits, abits=abits, correction=False, equalize=(), rotate=(), balance=False,
                  normalize_rows=False, activation_affine=False, clipping="adam", softmax="log_sqrt2")


def bits_of(text: str) -> tuple[int, int]:
    """(weights, activations) of a text such as W4A4."""
    found = re.fullmatch(r"[Ww](\d)[Aa](\d)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: bits are written as W4A4")
    return int(found[1]), int(found[2])


def rows() -> Iterator[tuple[str, str, Recipe]]:
    """(section, label, recipe) of every RepQuant and RepQ-ViT row."""
    for w, a in BITS:
        yield "methods", f"RepQ-ViT W{w}A{a}", repq_vit(w, a)
        yield "methods", f"RepQuant as published W{w}A{a}", published(w, a)
        yield "methods", f"RepQuant W{w}A{a}", Recipe(wbits=w, abits=a)
    for w, a in ABLATED:
        base = Recipe(wbits=w, abits=a)
        tag = f"W{w}A{a}"
        yield "Table VII: norm scales", f"layer-wise {tag}", replace(base, norm="layerwise")
        yield "Table VII: norm scales", f"channel-wise {tag}", replace(base, norm="channelwise")
        yield "Table VII: norm scales", f"reparameterized {tag}", base
        yield "Table VIII: softmax grid", f"uniform {tag}", replace(base, softmax="uniform")
        yield "Table VIII: softmax grid", f"log2 {tag}", replace(base, softmax="log2")
        yield "Table VIII: softmax grid", f"log-sqrt2 to log2 (paper) {tag}", replace(base, softmax="log_sqrt2")
        yield "Table VIII: softmax grid", f"log, steps chosen {tag}", base
        yield "Table IX: parts", f"no clipping, no GPTQ {tag}", replace(base, clipping="none", gptq=False)
        yield "Table IX: parts", f"clipping only {tag}", replace(base, gptq=False)
        yield "Table IX: parts", f"GPTQ only {tag}", replace(base, clipping="none")
        yield "Table IX: parts", f"both {tag}", base
        yield "Table X: clipping", f"min-max {tag}", replace(base, clipping="none")
        yield "Table X: clipping", f"Adam (paper) {tag}", replace(base, clipping="adam")
        yield "Table X: clipping", f"search {tag}", base
        yield "past the norm: cross-layer equalization", f"none {tag}", replace(base, equalize=())
        for kind in EQUALIZE:
            yield "past the norm: cross-layer equalization", f"{kind} only {tag}", replace(base, equalize=(kind,))
        yield "past the norm: cross-layer equalization", f"default {tag}", base
        for name, change in PARTS.items():
            yield "past the paper: without one part", f"no {name} {tag}", replace(base, **change)
        yield "past the paper: without one part", f"default {tag}", base


class Bench:
    """One model with its data; measures callables that map images to logits."""

    def __init__(
        self, name: str, loaded: LoadedModel, calib: str, data: str, samples: int, seed: int,
        limit: int | None = None, *, stream: bool = False, device: str = "cpu",
    ) -> None:
        """`limit` test images are drawn, always the same; with `stream` they are decoded anew for each row, so that
        they need no memory.
        """
        self.name, self.loaded, self.seed, self.device = name, loaded, seed, device
        self.known: dict[tuple[Recipe, int], dict[str, float]] = {}
        size = tuple(loaded.example_inputs[0].shape[1:])
        spec = InputSpec("x", (None, *loaded.example_inputs[0].shape[1:]), torch.float32)
        self.calibration = torch.cat([b[0] for b in load_calibration(
            calib, [spec], preprocessing=loaded.preprocessing, samples=samples, seed=seed).batches])
        images = labelled_folder(data, loaded.preprocessing, size, 50 if stream else 250, limit, 0)
        self.images: Iterable[tuple[Tensor, Tensor]] = images if stream else list(images)
        pairs = [(self.as_float(x), y) for x, y in self.images]
        self.float_logits, self.labels = (torch.cat(each) for each in zip(*pairs))

    def as_float(self, images: Tensor) -> Tensor:
        assert self.loaded.module is not None
        with torch.inference_mode():
            return self.loaded.module(images)

    def measure(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        logits = torch.cat([predict(x) for x, _ in self.images])
        return {"top1": 100 * float((logits.argmax(1) == self.labels).double().mean()),
                "agreement": 100 * float((logits.argmax(1) == self.float_logits.argmax(1)).double().mean()),
                "sqnr_db": min(sqnr(logits, self.float_logits), 999.0), "images": len(self.labels)}

    def compiled(self, recipe: Recipe, loaded: LoadedModel | None = None) -> dict[str, float]:
        """Figures of the exported file, of another model where one is given. The same recipe is compiled once."""
        key = (recipe, id(loaded))
        if key not in self.known:
            self.known[key] = self._compiled(recipe, loaded)
        return self.known[key]

    def _compiled(self, recipe: Recipe, loaded: LoadedModel | None) -> dict[str, float]:
        start = time.perf_counter()
        result = compile(
            loaded or self.loaded,
            recipe=recipe,
            calibration=self.calibration,
            samples=len(self.calibration),
            seed=self.seed,
            device=self.device,
        )
        seconds = time.perf_counter() - start
        return {
            **self.measure(onnx_predictor(result.session(torch.get_num_threads()))),
            "megabytes": result.report["file_bytes"] / 1e6,
            "compile_seconds": seconds,
        }

    def quantize_static(self) -> dict[str, float]:
        """ONNX Runtime's own quantizer: QDQ, per-channel int8 weights, uint8 activations, min-max on the same images.
        """
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        batches = iter([{NAME: b.numpy()} for b in self.calibration.split(32)])

        class Reader(CalibrationDataReader):
            def get_next(self) -> Any:
                return next(batches, None)

        with tempfile.TemporaryDirectory() as folder:
            source, prepared, target = (str(Path(folder) / n) for n in ("float.onnx", "prepared.onnx", "int8.onnx"))
            self.export_float(source)
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(prepared, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
            size = Path(target).stat().st_size / 1e6
            return {**self.measure(onnx_predictor(session(target, threads=torch.get_num_threads()))), "megabytes": size}


    def nncf(self) -> dict[str, float]:
        """NNCF's settings for transformers, on the same images, executed by OpenVINO with float operators in float32:
        with its SmoothQuant, as it is by default, or without, whichever has less noise.

        Raises:
            ImportError: NNCF or OpenVINO is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "float.onnx"
            self.export_float(str(source))
            found = []
            for smooth in (True, False):
                target = Path(folder) / f"smooth_{smooth}.xml"
                quantize_nncf(source, target, {NAME: self.calibration}, smooth)
                runner = import_openvino().Core().compile_model(
                    str(target), "CPU", {**OPENVINO_FLOAT32, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
                size = sum(each.stat().st_size for each in Path(folder).glob(f"{target.stem}.*")) / 1e6
                values = self.measure(lambda x, r=runner: torch.from_numpy(r({NAME: x.numpy()})[0].copy()))
                found.append({**values, "megabytes": size, "smooth_quant": float(smooth)})
            return max(found, key=lambda values: values["sqnr_db"])

    def export_float(self, path: str) -> None:
        """The float model, with a free batch."""
        assert self.loaded.module is not None
        torch.onnx.export(self.loaded.module, self.loaded.example_inputs, path, dynamo=True, opset_version=21,
                          input_names=[NAME], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
                          external_data=False)


def onnx_predictor(runner: onnxruntime.InferenceSession) -> Callable[[Tensor], Tensor]:
    name = runner.get_inputs()[0].name
    return lambda x: torch.from_numpy(np.asarray(runner.run(None, {name: x.numpy()})[0]))


def plant_variation(loaded: LoadedModel, ratio: float = 30.0, seed: int = 0) -> LoadedModel:
    """The same function with norm channels scaled by log-uniform factors over `ratio`, undone in the Linears (METHOD's
    Fig. 4).
    """
    import copy

    assert loaded.module is not None
    module = copy.deepcopy(loaded.module)
    graph = normal_form(capture(module, loaded.example_inputs).graph_module)
    plan = run_pass(graph, MatchSites(Recipe()))
    state, generator = module.state_dict(), torch.Generator().manual_seed(seed)
    for group in plan.groups:
        if group.norm is None or group.shared_norm:
            continue
        names = [str(a.target) for a in group.norm.args[2:4] if hasattr(a, "target")]
        factors = torch.exp((torch.rand(state[names[0]].shape, generator=generator) - 0.5) * np.log(ratio))
        for name in names:
            state[name].mul_(factors)
        for consumer in group.consumers:
            state[str(consumer.args[1].target)].div_(factors)  # type: ignore[union-attr]
    return replace(loaded, module=module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", help="image folder to calibrate with")
    parser.add_argument("--data", help="class folders to evaluate on")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--weights", type=Path, help="another model's weights")
    parser.add_argument("--arch", help="its architecture, timm:NAME,...")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--images", type=int, help="test images, a random subset (all)")
    parser.add_argument("--only", help="rows whose label contains this text")
    parser.add_argument("--sections", help="sections whose name contains this text")
    add_options(parser, "accuracy.json")
    args = parser.parse_args()
    results = Results(args.results, {"samples": args.samples, "images": args.images}, args.keep)
    models = {args.weights.stem: args.weights} if args.weights else {name: MODELS[name] for name in args.models}
    if args.data and args.calib:
        for name, path in models.items():
            loaded = load_model(path, arch=args.arch)
            for seed in args.seeds:
                bench = Bench(name, loaded, args.calib, args.data, args.samples, seed, args.images)
                run_all(bench, results, args.only, args.sections)
    print(tables(results.rows()))


def run_all(bench: Bench, results: Results, only: str | None, sections: str | None) -> None:
    def row(section: str, label: str, run: Callable[[], dict[str, float]]) -> None:
        if (only and only not in label) or (sections and sections not in section):
            return
        found, new = results.measure((bench.name, section, label), bench.seed, run)
        if new:
            figures = " ".join(f"{k} {v:.2f}" for k, v in found.items())
            print(f"{bench.name:5s} seed {bench.seed} {label:40s} {figures}", flush=True)

    row("methods", "float", lambda: bench.measure(bench.as_float))
    row("methods", "onnxruntime quantize_static W8A8", bench.quantize_static)
    if importlib.util.find_spec("nncf") and importlib.util.find_spec("openvino"):
        row("methods", "NNCF in OpenVINO W8A8", bench.nncf)
    for section, label, recipe in rows():
        row(section, label, lambda r=recipe: bench.compiled(r))
    planted = plant_variation(bench.loaded)
    for w, a in [(6, 6), (4, 4)]:
        base = Recipe(wbits=w, abits=a)
        for label, recipe in [("layer-wise", replace(base, norm="layerwise")), ("RepQuant", base)]:
            row("planted inter-channel variation", f"{label} W{w}A{a}, original", lambda r=recipe: bench.compiled(r))
            row(
                "planted inter-channel variation",
                f"{label} W{w}A{a}, planted",
                lambda r=recipe: bench.compiled(r, planted),
            )


def tables(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: one table per section, one pair of columns per model; mean and spread over the seeds."""
    names = list(dict.fromkeys(name for name, _, _ in rows))
    return "\n".join(f"\n**{section}**\n\n{table}" for section, table in sections(rows, names).items())


def sections(rows: dict[Key, dict[int, Values]], models: Sequence[str] = ()) -> dict[str, str]:
    """Markdown by section: one pair of columns for each model; for those that a section has where none are given."""
    parts: dict[str, dict[Key, dict[int, Values]]] = {}
    for (model, section, label), found in rows.items():
        parts.setdefault(section, {})[model, label] = found
    return {section: accuracy_table(part, models) for section, part in parts.items()}


if __name__ == "__main__":
    main()
