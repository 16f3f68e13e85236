"""The targets, and what each runtime computes of the same models: the tables of docs/reference/targets.md.

    python benchmarks/targets.py

The two committed models are compiled on images of dead leaves (`--samples`), so that anyone can run this. For each
runtime: SQNR of its output against the FX reference, on held-back samples, and the share of codes that differ on
equal inputs at the worst quantizer. OpenVINO is run with its float operators in float32, which is what the compiler
checks, and as it runs unasked on this processor. The last table is of a processor without VNNI, by an exact model of
its sums (`repquant_fx/fit.py`). Rows that `--results` already holds for the same commit are not run again
(`results.py`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accuracy import MODELS
from results import Key, Results, Values, add_options, cell

from repquant_fx import Recipe, compile
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.synthetic import Synthesis, synthesise
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.compiled import CompiledModel
from repquant_fx.fit import run_saturating
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.named_runtime import check_in_runtime
from repquant_fx.parity import sqnr
from repquant_fx.report import finite
from repquant_fx.targets import RUNTIMES, TARGETS, find

BITS = [(8, 8), (4, 4), (6, 6)]
EQUAL = 999.0  # in place of infinity


def compiled(loaded: LoadedModel, wbits: int, abits: int, samples: int, seed: int, target: str) -> CompiledModel:
    return compile(loaded, images(loaded, seed, samples), Recipe(wbits=wbits, abits=abits), seed=seed, target=target)


def of_parity(parity: Mapping[str, Any]) -> Values:
    worst = max((each["share_step"] for each in parity["quantizers"].values()), default=0.0)
    found = parity["output_sqnr"]
    return {"sqnr_db": EQUAL if found is None or math.isinf(found) else found, "codes": 100 * worst,
            "free": 100 * parity["mean_share"]}


def runtimes(loaded: LoadedModel, wbits: int, abits: int, samples: int, seed: int) -> Values:
    """One compile, checked in every runtime."""
    result = compiled(loaded, wbits, abits, samples, seed, "openvino")
    report = result.report
    values = {f"ort {key}": value for key, value in of_parity(report["parity"]).items()}
    named = report["runtime"]
    if named["parity"] is not None:
        values |= {f"openvino {key}": value for key, value in of_parity(named["parity"]).items()}
    if named["precision"]:
        values |= {"unasked sqnr_db": named["output_sqnr"], "precision": named["precision"]}
    reference = check_in_runtime("reference", result.graph_module, result.proto, result.quantizers,
                                 [images(loaded, seed + 1, 2)], [result.proto.graph.input[0].name])
    assert reference is not None and reference.parity is not None
    values |= {f"reference {key}": value for key, value in of_parity(finite(reference.parity.to_dict())).items()}
    lost = saturated(result, images(loaded, seed + 1, 8)) if abits == 8 else EQUAL
    return {**values, "quantization": report["output_sqnr_db"], "saturated": lost}


def saturated(result: CompiledModel, x: torch.Tensor) -> float:
    """The FX reference with sums that saturate against itself, dB."""
    with torch.no_grad():
        expected = tensors_in(result.graph_module(x))
    return min(*(sqnr(a, b) for a, b in zip(run_saturating(result.graph_module, x), expected)), EQUAL)


def profile(loaded: LoadedModel, samples: int, seed: int) -> Values:
    """W8A8 for a processor without VNNI."""
    result = compiled(loaded, 8, 8, samples, seed, "ort-cpu-avx2")
    lost = saturated(result, images(loaded, seed + 1, 8))
    return {"quantization": result.report["output_sqnr_db"], "saturated": lost}


def images(loaded: LoadedModel, seed: int, count: int) -> torch.Tensor:
    """Dead leaves in the colours that the model expects."""
    spec = InputSpec("x", (None, *loaded.example_inputs[0].shape[1:]), torch.float32)
    return synthesise(Synthesis([spec], None, loaded.preprocessing, None, count, False, seed), count,
                      Checkpoint()).columns[0]


# ---- tables ----------------------------------------------------------------------------------------------------------


def targets_table() -> str:
    """Markdown: a row for each target."""
    lines = ["| target | for | functions | Linears on | containers | weights | refused | checked in | tested with |",
             "|---|---|---|---|---|---:|---|---|---|"]
    for name, target in TARGETS.items():
        cells = [f"`{name}`", target.about, "inlined" if target.inlined else "kept",
                 "matrices" if target.flat else "tokens", ", ".join(target.containers),
                 f"{target.weight_bits} bits", ", ".join(sorted(target.refused)) or "none", RUNTIMES[target.runtime],
                 target.tested]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def decibels(seeds: Mapping[int, Values], name: str) -> str:
    return cell(seeds, name, 1).replace(f"{EQUAL:.1f}", "identical")


def parity_table(rows: Mapping[Key, Mapping[int, Values]]) -> str:
    """Markdown: a row for each model and number of bits."""
    names = ["ort", "openvino", "reference"]
    lines = ["| | quantization dB | " + " | ".join(
        f"{RUNTIMES[name]} dB | codes %" for name in names) + " | OpenVINO unasked dB |",
        "|---|---:|" + "---:|---:|" * len(names) + "---:|"]
    for (model, label), seeds in rows.items():
        if "ort sqnr_db" in next(iter(seeds.values())):
            cells = [decibels(seeds, "quantization")]
            for name in names:
                cells += [decibels(seeds, f"{name} sqnr_db"), cell(seeds, f"{name} codes", 4)]
            precision = next(iter(seeds.values())).get("precision", "")
            cells.append(f"{decibels(seeds, 'unasked sqnr_db')} ({precision})" if precision else "the same")
            lines.append(f"| {model} {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def saturation_table(rows: Mapping[Key, Mapping[int, Values]]) -> str:
    """Markdown: a row for each model with 8-bit activations."""
    lines = ["| | against float dB | the same sums, saturating, dB |", "|---|---:|---:|"]
    for (model, label), seeds in rows.items():
        if label.endswith("A8"):
            lines.append(f"| {model} {label} | {decibels(seeds, 'quantization')} | {decibels(seeds, 'saturated')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=48)
    add_options(parser, "targets.json")
    options = parser.parse_args()
    results = Results(options.results, {"samples": options.samples}, options.keep)
    models = {name: load_model(path) for name, path in MODELS.items()}
    for seed in options.seeds:
        work = {(name, f"W{w}A{a}"): partial(runtimes, loaded, w, a, options.samples, seed)
                for w, a in BITS for name, loaded in models.items()}
        for name, loaded in models.items():
            bits = find("ort-cpu-avx2").recipe(Recipe()).wbits
            work[name, f"W{bits}A8"] = partial(profile, loaded, options.samples, seed)
        for key, run in work.items():
            values, new = results.measure(key, seed, run)
            if new:
                print(*key, f"seed {seed}", values, flush=True)
    print(targets_table(), parity_table(results.rows()), saturation_table(results.rows()), sep="\n\n")


if __name__ == "__main__":
    main()
