"""What compiling costs: seconds and peak memory by stage, and the clipping search beside the paper's Adam.

    python benchmarks/compile_time.py stages --models deit_small vit_cifar [--depths 3 6 12] [--device cuda] [--results
    compile_time.json] python benchmarks/compile_time.py clipping --images train_folder [--minilm FOLDER --text FILE]
    [--results compile_time.json]

`stages`: each compile in a process of its own, default recipe at W4A4, 128 calibration samples; peak memory is that of
the process by the end of the stage. `--depths` shows how cost grows with depth. `clipping`: for every LayerNorm,
per-channel bounds on the calibration sample by `search_bounds` (the default) and by `learn_bounds` (the paper's 100
iterations of Adam): seconds of each, and the ratio of the squared errors that they leave. The paper's Table X gives
seconds per layer on an A6000 for DeiT-S at W4A4, 32 images: 17 by its Adam, 495 by a search.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latency_models import LENGTH, MODELS
from results import Key, Results, Values, add_options
from torch import Tensor

from repquant_fx import Recipe, compile

HERE = Path(__file__).parent
CIFAR = {"vit_cifar": "weights/vit_cifar10.safetensors", "swin_cifar": "weights/swin_cifar10.safetensors"}
SAMPLES = 128


# ---- stages ----------------------------------------------------------------------------------------------------------


def measure_one(name: str, depth: int | None, device: str) -> dict[str, Any]:
    """Compile one model; what the report says of time and memory."""
    torch.manual_seed(0)
    recipe, started = Recipe(wbits=4, abits=4), time.perf_counter()
    if name in CIFAR:
        images = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        result = compile(str(HERE / CIFAR[name]), images, recipe, device=device)
    elif depth is not None:
        import timm

        model = timm.create_model(f"{name}_patch16_224", depth=depth)
        result = compile(model, MODELS[name].inputs(SAMPLES)["x"], recipe, device=device)
    else:
        entry = MODELS[name]
        data = entry.inputs(SAMPLES)
        given: Any = data if "x" not in data else data["x"]
        result = compile(entry.build(), given, recipe, device=device,
                         example_inputs={k: v[:2] for k, v in data.items()} if "x" not in data else None)
    total, report = time.perf_counter() - started, result.report
    return {
        "total": round(total, 2),
        "seconds": report["seconds"],
        "peaks_mb": report["peaks_mb"],
        "layers": len(report["layers"]),
    }


def apart(name: str, depth: int | None, options: argparse.Namespace) -> Values:
    """`measure_one` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, __file__, "one", name, str(depth or 0), options.device, str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "threads": options.threads, "device": options.device}


def stages(options: argparse.Namespace) -> None:
    """Run the compiles and print a table."""
    results = Results(options.results, {"threads": options.threads, "device": options.device}, options.keep)
    for name in options.models:
        for depth in options.depths or [None]:
            label = name if depth is None else f"{name}, depth {depth}"
            found, _ = results.measure(("stages", label), 0, lambda n=name, d=depth: apart(n, d, options))
            print(
                f"\n{label}: {found['total']:.1f} s, {found['layers']} layers, {options.threads} threads, "
                f"{options.device}"
            )
            for stage, seconds in found["seconds"].items():
                peak = found["peaks_mb"].get(stage)
                print(
                    f"  {'  ' if '/' in stage else ''}{stage.split('/')[-1]:28s} {seconds:8.2f} s"
                    + (f"   peak {peak:7.0f} MB" if peak else "")
                )


def stages_table(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: seconds by stage and peak memory of quantizing; a row for each model."""
    parts = {"scales": "choose scales", "moments": "second moments", "weights": "quantize weights"}
    lines = ["| | products | total s | load, capture | quantize | of it: " + " | ".join(parts)
             + " | export | check | GB |", "|---|" + "---:|" * (7 + len(parts))]
    for (_, name), seeds in rows.items():
        values = seeds[0]
        seconds = values["seconds"]
        cells = [str(values["layers"]), f"{values['total']:.0f}", f"{seconds['load'] + seconds['capture']:.1f}",
                 f"{seconds['quantize']:.1f}", *(f"{seconds[f'quantize/{part}']:.1f}" for part in parts.values()),
                 f"{seconds['export']:.1f}", f"{seconds['check']:.1f}", f"{values['peaks_mb']['quantize'] / 1e3:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- clipping --------------------------------------------------------------------------------------------------------


def norm_samples(model: Any, calibration: Any, **keywords: Any) -> Iterator[Tensor]:
    """Samples of shape (channels, values) of every norm whose Linears are quantized, as calibration records them."""
    from repquant_fx.options import from_keywords
    from repquant_fx.passes.base import run_passes
    from repquant_fx.passes.insert_observers import InsertObservers
    from repquant_fx.passes.slots import observer
    from repquant_fx.preparation import prepare
    from repquant_fx.quantizers.observers import Observer

    source, data = from_keywords(model, calibration, {"samples": SAMPLES, **keywords})
    prepared = prepare(source, data, Recipe(wbits=4, abits=4))
    graph_module, batches = prepared.graph_module, list(prepared.data.batches)
    run_passes(graph_module, [InsertObservers(prepared.plan, len(batches))])
    for module in graph_module.modules():
        if isinstance(module, Observer):
            module.start(len(batches))
    with torch.no_grad():
        for batch in batches:
            graph_module(*batch)
    for group in prepared.plan.groups:
        sites = [site for site in group.sites if site.role == "norm"]
        if sites:
            yield torch.cat([observer(graph_module, site).sample() for site in sites], dim=1)


def clipping(options: argparse.Namespace) -> None:
    """Search and Adam on every norm; one table per model."""
    results = Results(options.results, {"threads": options.threads}, options.keep)
    torch.set_num_threads(options.threads)
    models = [(name, str(HERE / path), options.images, {}) for name, path in CIFAR.items()]
    if options.minilm:
        models.append(("MiniLM-L6", str(options.minilm), str(options.text), {"seq_len": LENGTH}))
    for name, model, calibration, keywords in models:
        samples = functools.cache(functools.partial(list, norm_samples(model, calibration, **keywords)))
        for bits in options.bits:
            found, _ = results.measure(
                ("clipping", f"{name}, {bits} bits"), 0, lambda b=bits, s=samples: compare(s(), b, options.threads)
            )
            print(
                f"{name}, {bits} bits: {found['norms']} norms, search {found['search_seconds']:.2f} s, Adam "
                f"{found['adam_seconds']:.2f} s "
                f"({found['adam_seconds'] / found['search_seconds']:.1f} times as long); squared error of the search "
                "over Adam's: median "
                f"{found['median_error_ratio']:.3f}, largest {found['worst_error_ratio']:.3f}",
                flush=True,
            )


def clipping_table(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: seconds of both ways, and the squared error of the search over Adam's; a row for each model."""
    lines = ["| | norms | search s | Adam s | times faster | error, median | largest |", "|---|" + "---:|" * 6]
    for (_, name), seeds in rows.items():
        values = seeds[0]
        cells = [str(values["norms"]), f"{values['search_seconds']:.2f}", f"{values['adam_seconds']:.2f}",
                 f"{values['adam_seconds'] / values['search_seconds']:.0f}", f"{values['median_error_ratio']:.3f}",
                 f"{values['worst_error_ratio']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(norms: list[Tensor], bits: int, threads: int) -> Values:
    """Seconds of both ways on the samples of all norms, and the squared error of the search over Adam's."""
    from repquant_fx.quantizers.clipping import learn_bounds, search_bounds

    seconds: dict[str, list[float]] = {"search": [], "adam": []}
    ratios = []
    for sample in norms:
        errors = {}
        for method, find in (("search", search_bounds), ("adam", learn_bounds)):
            started = time.perf_counter()
            errors[method] = float(find(sample, bits).error.double().sum())
            seconds[method].append(time.perf_counter() - started)
        ratios.append(errors["search"] / errors["adam"])
    return {
        "norms": len(norms),
        "values": int(sum(sample.numel() for sample in norms)),
        "search_seconds": round(sum(seconds["search"]), 3),
        "adam_seconds": round(sum(seconds["adam"]), 3),
        "worst_error_ratio": round(max(ratios), 4),
        "median_error_ratio": round(statistics.median(ratios), 4),
        "threads": threads,
    }


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        name, depth, device, threads = sys.argv[2:6]
        torch.set_num_threads(int(threads))
        print(json.dumps(measure_one(name, int(depth) or None, device)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    first = what.add_parser("stages")
    first.add_argument(
        "--models", nargs="*", default=["vit_cifar", "swin_cifar", "deit_small", "minilm"], choices=[*CIFAR, *MODELS]
    )
    first.add_argument("--depths", nargs="*", type=int, help="of a plain ViT, to see how cost grows")
    first.add_argument("--device", default="cpu")
    second = what.add_parser("clipping")
    second.add_argument("--images", required=True, help="folder of training images for the CIFAR models")
    second.add_argument("--minilm", type=Path, help="transformers directory of a sentence encoder")
    second.add_argument("--text", type=Path, help="calibration text for it")
    second.add_argument("--bits", nargs="*", type=int, default=[4, 8])
    for each in (first, second):
        each.add_argument("--threads", type=int, default=2)
        add_options(each, None, seeds=False)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}", flush=True)
    (stages if options.what == "stages" else clipping)(options)


if __name__ == "__main__":
    main()
