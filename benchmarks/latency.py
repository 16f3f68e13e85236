"""Inference speed on the CPU, ours beside float and other tools, under ONNX Runtime and OpenVINO. Prints ratios.

    python benchmarks/latency.py --models deit_small --batches 1 8 --threads 1 2 [--work FOLDER] [--results
    latency.json]

Weights are random: speed does not depend on them. Every variant runs in a process of its own with one session; the
processes take turns, a few runs each, and the ratio is that of the medians over all turns, to float under ONNX Runtime
in the same turns. Quartiles are kept beside the medians, and seconds of CPU, which other jobs on a machine move less.
Variants:

- float: torch.onnx.export of the model;
- peer: `quantize_static`, QDQ, per-channel int8 weights, uint8 activations, after its own pre-processing; all operators
  it knows;
- peer, products: the same, restricted to MatMul, Gemm and Conv (its best variant: Softmax, LayerNorm, GELU and
  additions stay float);
- optimized float, dynamic: see `latency_peers.py`;
- W8A8, W6A6, W4A4: ours; W8A8 fast: with the preset `fast`;
- in OpenVINO, where it is installed: float, NNCF, and W8A8, our file for it with the preset `fast`. Each with float
  operators in float32 and, where OpenVINO would take another precision on this processor, as it runs unasked.

Figures that `--results` already holds for the same commit and machine are not measured again (`results.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_models import MODELS
from latency_peers import optimize, quantize_dynamic, quantize_nncf, quantize_static
from results import Key, Results, Values, add_options, machine
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.recipe import fast
from repquant_fx.runtimes import OPENVINO_FLOAT32, import_openvino, version

BITS = [(8, 8), (6, 6), (4, 4)]
# what takes time in compiling and not in running is off
FAST = {
    "gptq": False,
    "correction": False,
    "clipping": "none",
    "activations": "minmax",
    "weights": "minmax",
    "softmax_scale": "percentile",
}


@dataclass(frozen=True)
class Variant:
    """A file, and in what it runs.

    Attributes:
        precision: of OpenVINO's float operators; "" for what it takes unasked.
    """

    path: Path
    runtime: str = "ort"
    precision: str = ""


def write_variants(name: str, folder: Path, wanted: set[str] | None = None) -> dict[str, Variant]:
    """All variants, or those that are wanted; files that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = MODELS[name]
    torch.manual_seed(0)
    model = entry.build().eval()
    calibration = entry.inputs(8)
    source = folder / "float.onnx"

    def ours(wbits: int, abits: int, target: str = "ort-cpu", **changes: Any) -> Callable[[Path], object]:
        recipe = Recipe(wbits=wbits, abits=abits, **{**FAST, **changes})
        return lambda path: compiled(model, calibration, recipe, target).save(path)

    quick = {each: getattr(fast(8, 8), each) for each in ("symmetric", "softmax")}
    ways: dict[str, tuple[str, str, Callable[[Path], object]]] = {
        "float": ("ort", "float.onnx", lambda path: export_float(model, calibration, path)),
        "peer": ("ort", "peer.onnx", lambda path: quantize_static(source, path, calibration, None)),
        "peer, products": ("ort", "peer_products.onnx", lambda path: quantize_static(
            source, path, calibration, ["MatMul", "Gemm", "Conv"])),
        "optimized float": ("ort", "optimized.onnx", lambda path: optimize(source, path, "x" not in calibration)),
        "dynamic": ("ort", "dynamic.onnx", lambda path: quantize_dynamic(source, path)),
        **{f"W{w}A{a}": ("ort", f"W{w}A{a}.onnx", ours(w, a)) for w, a in BITS},
        "W8A8 fast": ("ort", "W8A8_fast.onnx", ours(8, 8, **quick)),
        "OpenVINO float": ("openvino", "float.onnx", lambda path: None),
        "OpenVINO NNCF": ("openvino", "nncf.xml", lambda path: quantize_nncf(source, path, calibration)),
        "OpenVINO W8A8": ("openvino", "W8A8_openvino.onnx", ours(8, 8, "openvino", **quick)),
    }
    variants: dict[str, Variant] = {}
    for label, (runtime, file, write) in ways.items():
        if (wanted is not None and label not in wanted) or (runtime == "openvino" and version("openvino") is None):
            continue
        path = folder / file
        try:
            if not path.exists():
                write(path)
        except ImportError as error:
            print(f"{label} is left out: {error.name} is not installed", flush=True)
            continue
        variants[label] = Variant(path, runtime, "f32" if runtime == "openvino" else "")
        if runtime == "openvino" and (unasked := precision()) != "f32":
            variants[f"{label}, {unasked}"] = Variant(path, runtime)
    return variants


@functools.cache
def precision() -> str:
    """What OpenVINO's float operators compute in unasked, on this processor."""
    found = import_openvino().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return {"float32": "f32"}.get(str(found), str(found))


def compiled(model: nn.Module, calibration: dict[str, Tensor], recipe: Recipe, target: str) -> Any:
    return compile(
        model,
        recipe=recipe,
        calibration=calibration if "x" not in calibration else calibration["x"],
        batch_size=4,
        example_inputs={k: v[:2] for k, v in calibration.items()} if "x" not in calibration else [calibration["x"][:2]],
        check=False,
        target=target,
    )


class First(nn.Module):
    """The first output of a transformers model, so that exporters see a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def export_float(model: nn.Module, calibration: dict[str, Tensor], path: Path) -> None:
    text = "input_ids" in calibration
    batch = torch.export.Dim("batch", min=1)
    axes: Any = {0: batch, 1: torch.export.Dim("sequence", min=2, max=512)} if text else {0: batch}
    torch.onnx.export(
        First(model) if text else model,
        tuple(v[:2] for v in calibration.values()),
        str(path),
        dynamo=True,
        opset_version=21,
        input_names=list(calibration),
        dynamic_shapes=tuple(axes for _ in calibration),
        verbose=False,
        external_data=False,
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


def runner(variant: Variant, data: str, threads: int) -> Callable[[], object]:
    """What runs a variant once."""
    with np.load(data) as stored:
        arrays = dict(stored)
    if variant.runtime == "ort":
        from repquant_fx import session

        found = session(variant.path, threads=threads)
        feed = {node.name: arrays[node.name] for node in found.get_inputs()}
        return lambda: found.run(None, feed)
    core = import_openvino().Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                **(OPENVINO_FLOAT32 if variant.precision else {})}
    request = core.compile_model(core.read_model(variant.path), "CPU", settings).create_infer_request()
    inputs = {name: array for name, array in arrays.items()
              if any(name in each.get_names() for each in request.model_inputs)}
    return lambda: request.infer(inputs)


def serve(variant: Variant, data: str, threads: int) -> None:
    """A worker: reads how many runs to make, answers with their seconds, passed and of CPU."""
    run = runner(variant, data, threads)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start, busy = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - start, time.process_time() - busy))
        print(json.dumps(times), flush=True)


def measure(
    variants: dict[str, Variant], inputs: dict[str, Tensor], threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Seconds per run of each variant, taking turns until `seconds` have passed for each: median and quartiles, and the
    median of the CPU's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "inputs.npz"
        np.savez(data, **{k: v.numpy() for k, v in inputs.items()})  # type: ignore[arg-type]
        workers = {
            label: subprocess.Popen(
                [sys.executable, __file__, "--serve", str(each.path), each.runtime, each.precision, str(data),
                 str(threads)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for label, each in variants.items()
        }
        try:
            def ask(label: str, runs: int) -> list[tuple[float, float]]:
                worker = workers[label]
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write(f"{runs}\n")
                worker.stdin.flush()
                return list(json.loads(worker.stdout.readline()))

            slowest = {label: statistics.median(each[0] for each in ask(label, 3)) for label in workers}  # warm up
            turns = 12
            runs = {label: max(1, int(seconds / turns / s)) for label, s in slowest.items()}
            times: dict[str, list[tuple[float, float]]] = {label: [] for label in workers}
            for _ in range(turns):
                for label in workers:
                    times[label] += ask(label, runs[label])
            return {label: spread(each) for label, each in times.items()}
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()


def spread(times: list[tuple[float, float]]) -> dict[str, float]:
    """Median and quartiles of seconds that passed, and the median of the CPU's."""
    low, median, high = statistics.quantiles([each[0] for each in times], n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "cpu": statistics.median(each[1] for each in times)}


def seconds_of(value: Any) -> float:
    """The median; older rows hold nothing else."""
    return float(value["median"] if isinstance(value, dict) else value)


def main() -> None:
    if len(sys.argv) == 7 and sys.argv[1] == "--serve":
        return serve(Variant(Path(sys.argv[2]), *sys.argv[3:5]), sys.argv[5], int(sys.argv[6]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--variants", nargs="*", help="measure these labels alone (float always)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of running a variant")
    parser.add_argument("--work", type=Path, help="keep the files of all variants here")
    add_options(parser, None, seeds=False)
    args = parser.parse_args()
    print("instruction sets:", ", ".join(machine()["instructions"]) or "none known", flush=True)
    results = Results(args.results, {"seconds": args.seconds, "variants": args.variants}, args.keep)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            run_all(name, (args.work or Path(scratch)) / name, args, results)
    print(table(results.rows()))


def run_all(name: str, folder: Path, args: argparse.Namespace, results: Results) -> None:
    wanted = None if args.variants is None else {"float", *args.variants}

    @functools.cache
    def files() -> dict[str, Variant]:
        return write_variants(name, folder, wanted)

    results.measure(
        (name, "megabytes"), 0, lambda: {
            label: each.path.stat().st_size / 1e6 for label, each in files().items() if each.runtime == "ort"}
    )
    for threads in args.threads:
        for batch in args.batches:
            key = f"batch {batch}, threads {threads}"
            medians, _ = results.measure(
                (name, key), 0, lambda b=batch, t=threads: measure(files(), MODELS[name].inputs(b), t, args.seconds)
            )
            print(f"{name:11s} {key:20s} "
                  + "  ".join(f"{k} {compared(medians, k)}" for k in medians), flush=True)


def compared(found: Values, label: str) -> str:
    """How many times faster than float, the quartiles' range, and the same by seconds of CPU."""
    base, each = found["float"], found[label]
    ratio = seconds_of(base) / seconds_of(each)
    if not isinstance(each, dict):
        return f"{ratio:.2f}x"
    fastest, slowest = base["median"] / each["low"], base["median"] / each["high"]
    return f"{ratio:.2f}x [{slowest:.2f}-{fastest:.2f}], CPU {base['cpu'] / each['cpu']:.2f}x"


def table(found: dict[Key, dict[int, Values]]) -> str:
    """Markdown: how many times faster than float at batch 1 on one thread, with file sizes; then ours beside the better
    peer elsewhere.
    """
    results: dict[str, dict[str, Values]] = {}
    for (name, key), values in found.items():
        results.setdefault(name, {})[key] = {
            label: seconds_of(value) for label, value in values[0].items()}  # sizes are numbers, too
    labels = list(dict.fromkeys(label for r in results.values() for label in r["megabytes"]))[1:]
    first, others = (
        "batch 1, threads 1",
        list(dict.fromkeys(key for r in results.values() for key in r if key not in ("megabytes",))),
    )
    lines = [
        "| | "
        + " | ".join(labels)
        + " | float MB | "
        + " | ".join(f"{x} MB" for x in labels if x.startswith("W"))
        + " |",
        "|---|" + "---:|" * (len(labels) + 1 + sum(x.startswith("W") for x in labels)),
    ]
    for name, rows in results.items():
        speed = [f"{rows[first]['float'] / rows[first][x]:.2f}" if x in rows.get(first, {}) else "" for x in labels]
        sizes = [
            f"{rows['megabytes'][x]:.1f}"
            for x in ("float", *(x for x in labels if x.startswith("W")))
            if x in rows["megabytes"]
        ]
        lines.append(f"| {title(name)} | " + " | ".join([*speed, *sizes]) + " |")
    others = [key for key in others if key != first]
    if others:
        lines += ["", "| W8A8 / W4A4 (better peer) | " + " | ".join(others) + " |", "|---|" + "---:|" * len(others)]
    for name, rows in results.items() if others else ():
        cells = []
        for key in others:
            found = {label: rows[key]["float"] / seconds for label, seconds in rows.get(key, {}).items()}
            peer = max((ratio for label, ratio in found.items() if label.startswith("peer")), default=None)
            ours = " / ".join(f"{found[x]:.2f}" for x in ("W8A8", "W4A4") if x in found)
            cells.append(f"{ours} ({peer:.2f})" if peer is not None else ours)
        lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *openvino_table(results)])


def title(name: str) -> str:
    return MODELS[name].title if name in MODELS else name


def openvino_table(found: dict[str, dict[str, Values]]) -> list[str]:
    """Markdown: the faster of our files at W8A8, under ONNX Runtime or OpenVINO, beside NNCF in OpenVINO; empty where
    that was not measured.
    """
    keys = list(dict.fromkeys(key for rows in found.values() for key, row in rows.items() if "OpenVINO NNCF" in row))
    if not keys:
        return []
    lines = ["", "| best of ours (NNCF) | " + " | ".join(keys) + " |", "|---|" + "---:|" * len(keys)]
    for name, rows in found.items():
        cells = []
        for row in (rows.get(key, {}) for key in keys):
            ours, nncf = (max((row["float"] / value for label, value in row.items() if part in label), default=None)
                          for part in ("W8A8", "NNCF"))
            cells.append(f"{ours:.2f} ({nncf:.2f})" if ours is not None and nncf is not None else "")
        if any(cells):
            lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
