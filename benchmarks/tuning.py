"""What `repquant-fx tune` gains on this machine: a row for each model, target and number of threads.

    python benchmarks/tuning.py --models deit_small [--depth 2] [--grids] --targets ort-cpu openvino --threads 1 2
    [--results tuning.json]

Weights are random: speed does not depend on them, SQNR does, so the floor is that of a model without training. `times
faster` is against the default recipe at W8A8, both compiled with all of its settings, in turns; 1.00 where the start
stays. `--depth` takes a timm model with fewer blocks, `--grids` tries the grids alone and no layers one by one. On a
busy machine `--cpu` counts seconds of the CPU, which other jobs move less; of one thread they are those of a quiet
machine.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from latency_models import MODELS
from results import Key, Results, Values, add_options

from repquant_fx import LayerRule, Recipe, log, tune
from repquant_fx.targets import TIMED
from repquant_fx.tuning import timing, tuner

GRIDS = (LayerRule("*", wbits=8),)  # layers whose bits a rule sets are left as they are


def measure(name: str, target: str, threads: int, args: argparse.Namespace) -> Values:
    """Tune one model; what came of it."""
    torch.manual_seed(0)
    data = MODELS[name].inputs(args.samples)
    given: Any = data if "x" not in data else data["x"]
    if args.depth is None:
        model = MODELS[name].build()
    else:
        import timm

        model = timm.create_model(f"{name}_patch16_224", depth=args.depth)
    found = tune(model, given, Recipe(layers=GRIDS if args.grids else ()), target=target, threads=threads,
                 batch=args.batch, max_drop=args.max_drop, seconds=args.seconds, batch_size=4,
                 example_inputs={k: v[:2] for k, v in data.items()} if "x" not in data else [data["x"][:2]])
    print(found, flush=True)
    return {**found.to_dict(), "recipe": None}


def table(rows: Mapping[Key, Mapping[int, Values]]) -> str:
    """Markdown: what was taken, times faster with quartiles, SQNR before and after."""
    lines = ["| | taken | times faster | SQNR dB of the start | tuned |", "|---|---|---:|---:|---:|"]
    for key, seeds in rows.items():
        for values in seeds.values():
            best = next((each for each in values["attempts"] if each["accepted"]), None)
            start = values["start"] or values["quick"]
            taken, speed, after = ("nothing", "1.00", start["sqnr_db"]) if best is None else (
                ", ".join(best["forms"]), f"{best['median']:.2f} [{best['low']:.2f}-{best['high']:.2f}]",
                best["sqnr_db"])
            before, after = ("none" if each is None else f"{each:.1f}" for each in (start["sqnr_db"], after))
            lines.append(f"| {' '.join(key)} | {taken} | {speed} | {before} | {after} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--depth", type=int, help="blocks of a timm ViT (all of them)")
    parser.add_argument("--grids", action="store_true", help="try grids alone, no layers one by one")
    parser.add_argument("--targets", nargs="*", default=["ort-cpu", "openvino"], choices=TIMED)
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--cpu", action="store_true", help="count seconds of the CPU")
    add_options(parser, None, seeds=False)
    args = parser.parse_args()
    if args.cpu:
        tuner.take_turns = functools.partial(timing.take_turns, clock=time.process_time)
    depends = ("depth", "grids", "batch", "samples", "seconds", "max_drop", "cpu")
    settings = {name: getattr(args, name) for name in depends}
    results = Results(args.results, settings, args.keep)
    with log.using(log.NORMAL):
        for name in args.models:
            for target in args.targets:
                for threads in args.threads:
                    results.measure((name, target, f"threads {threads}"), 0,
                                    lambda n=name, t=target, k=threads: measure(n, t, k, args))
    print(table(results.rows()))


if __name__ == "__main__":
    main()
