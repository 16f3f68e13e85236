"""Table I of the paper, for whoever has ImageNet: our rows beside the published ones.

    python benchmarks/imagenet.py --data VAL --calib TRAIN --models deit_small swin_small [--bits W4A4 W6A6]
    python benchmarks/imagenet.py --data VAL --calib TRAIN --models deit_small --weights deit_small.safetensors

VAL and TRAIN hold one folder of images for each class; the order of their names is that of the classes. A model is a
name of the paper's table or any of timm's. timm downloads its weights unless `--weights` gives them; `--arch` is the
architecture of such a file, where it is not the one that the name stands for.

For each model and width: RepQ-ViT and RepQuant as published, both in this code; the default here, and with block
reconstruction. Each is measured on all images of VAL (or `--images`, a random subset), executed by ONNX Runtime from
the exported file. Published figures are those of the papers, for all 50,000 images: RepQ-ViT and RepQuant from Table I
of RepQuant (arXiv 2402.05628), FIMA-Q and GLF-Q from their own. Rows that `--json` already holds for the same commit
are not run again (`results.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from accuracy import Bench, bits_of, published
from results import FOLDER, Key, Results, Values, cell

from repquant_fx import Recipe, repq_vit
from repquant_fx.frontends.loading import LoadedModel, load_model

METHODS = ("RepQ-ViT", "RepQuant", "FIMA-Q", "GLF-Q")
OURS = ("RepQ-ViT, this code", "RepQuant as published, this code", "this code", "this code, reconstructed")


class Published(NamedTuple):
    """A column of the paper's table: timm's model, float top-1, and top-1 by width in the order of METHODS."""

    timm: str
    top1: float
    quantized: dict[str, tuple[float | None, ...]]


def _row(timm: str, top1: float, w4: Sequence[float], w6: Sequence[float], w3: Sequence[float]) -> Published:
    """W4A4 of all four methods, W6A6 of the first two, W3A3 of the last two."""
    return Published(timm, top1, {"W6A6": (*w6, None, None), "W4A4": tuple(w4), "W3A3": (None, None, *w3)})


PUBLISHED = {
    "vit_small": _row("vit_small_patch16_224.augreg_in21k_ft_in1k", 81.39,
                      (65.05, 73.28, 76.68, 77.82), (80.43, 80.51), (64.09, 67.40)),
    "vit_base": _row("vit_base_patch16_224.augreg_in21k_ft_in1k", 84.54,
                     (68.48, 77.84, 83.04, 83.22), (83.62, 83.75), (77.63, 78.18)),
    "deit_tiny": _row("deit_tiny_patch16_224.fb_in1k", 72.21,
                      (57.43, 64.44, 66.84, 67.37), (70.76, 70.89), (55.55, 56.48)),
    "deit_small": _row("deit_small_patch16_224.fb_in1k", 79.85,
                       (69.03, 75.21, 76.87, 77.34), (78.90, 79.06), (69.13, 71.55)),
    "deit_base": _row("deit_base_patch16_224.fb_in1k", 81.80,
                      (75.61, 78.46, 80.33, 80.53), (81.27, 81.41), (76.54, 77.20)),
    "swin_small": _row("swin_small_patch4_window7_224.ms_in1k", 83.23,
                       (79.45, 81.52, 81.82, 82.01), (82.79, 82.93), (77.26, 78.10)),
    "swin_base": _row("swin_base_patch4_window7_224.ms_in22k_ft_in1k", 85.27,
                      (78.32, 82.80, 83.60, 83.80), (84.57, 84.86), (78.82, 80.45)),
}


def recipes(wbits: int, abits: int, steps: int) -> dict[str, Recipe]:
    """The rows of ours; without steps none is reconstructed."""
    found = (repq_vit(wbits, abits), published(wbits, abits), Recipe(wbits=wbits, abits=abits))
    reconstructed = (Recipe(wbits=wbits, abits=abits, reconstruct=steps),) if steps else ()
    return dict(zip(OURS, (*found, *reconstructed)))


def source(name: str, weights: Path | None, arch: str | None) -> LoadedModel:
    """timm's model with the weights of a file, or downloaded."""
    known = PUBLISHED.get(name)
    architecture = arch or f"timm:{known.timm if known else name}"
    return load_model(weights, arch=architecture) if weights else load_model(f"{architecture},pretrained")


def run_all(bench: Bench, widths: Sequence[tuple[int, int]], steps: int, results: Results) -> None:
    results.measure((bench.name, "", "float"), bench.seed, lambda: bench.measure(bench.as_float))
    for w, a in widths:
        for method, recipe in recipes(w, a, steps).items():
            key = (bench.name, f"W{w}A{a}", method)
            found, _ = results.measure(key, bench.seed, lambda recipe=recipe: bench.compiled(recipe))
            print(f"{bench.name} W{w}A{a} {method}, seed {bench.seed}: top-1 {found['top1']:.2f} %, "
                  f"{found['sqnr_db']:.2f} dB", flush=True)


def table(rows: dict[Key, dict[int, Values]], names: Sequence[str], widths: Sequence[tuple[int, int]]) -> str:
    """Markdown: for each width a row for each method, published or measured, and a column for each model."""
    lines = ["| top-1 % | | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]

    def line(bits: str, label: str, cells: list[str]) -> None:
        if any(cells):
            lines.append(f"| {bits} | {label} | " + " | ".join(cells) + " |")

    columns = [PUBLISHED.get(name) for name in names]
    line("float", "published", [f"{column.top1:.2f}" if column else "" for column in columns])
    line("float", "measured", [cell(rows.get((name, "", "float")), "top1") for name in names])
    for w, a in widths:
        bits = f"W{w}A{a}"
        for index, method in enumerate(METHODS):
            figures = [column.quantized.get(bits, (None,) * 4)[index] if column else None for column in columns]
            line(bits, f"{method}, published", ["" if figure is None else f"{figure:.2f}" for figure in figures])
        for method in OURS:
            line(bits, method, [cell(rows.get((name, bits, method)), "top1") for name in names])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="class folders to evaluate on")
    parser.add_argument("--calib", required=True, help="image folder to calibrate with")
    parser.add_argument("--models", nargs="+", default=list(PUBLISHED), metavar="NAME",
                        help=f"of {', '.join(PUBLISHED)}, or of timm (all of these)")
    parser.add_argument("--weights", type=Path, help="safetensors file of the one model, instead of a download")
    parser.add_argument("--arch", help="its architecture, timm:NAME,key=value")
    parser.add_argument("--bits", nargs="+", type=bits_of, default=[(6, 6), (4, 4), (3, 3)], help="(W6A6 W4A4 W3A3)")
    parser.add_argument("--reconstruct", type=int, default=400, metavar="STEPS",
                        help="of block reconstruction (%(default)s); 0 leaves its rows out")
    parser.add_argument("--images", type=int, help="test images, a random subset (all)")
    parser.add_argument("--calib-samples", type=int, default=1024, help="calibration images (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration images and of compiling")
    parser.add_argument("--device", default="cpu", help="where to calibrate and reconstruct (%(default)s)")
    parser.add_argument("--json", type=Path, default=FOLDER / "imagenet.json", help="file of all rows (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="use stored rows of other commits, machines and settings")
    options = parser.parse_args(arguments)
    if options.weights and len(options.models) > 1:
        parser.error("--weights holds one model: name one in --models")
    if options.arch and not options.weights:
        parser.error("--arch is the architecture of --weights")
    given = {name: str(getattr(options, name)) for name in ("weights", "arch") if getattr(options, name)}
    settings = {"samples": options.calib_samples, "images": options.images, "device": options.device,
                "steps": options.reconstruct, **given}
    results = Results(options.json, settings, options.keep)
    for name in options.models:
        loaded = source(name, options.weights, options.arch)
        for seed in options.seeds:
            bench = Bench(name, loaded, options.calib, options.data, options.calib_samples, seed, options.images,
                          stream=True, device=options.device)
            run_all(bench, options.bits, options.reconstruct, results)
    print(table(results.rows(), options.models, options.bits))


if __name__ == "__main__":
    main()
