"""`repquant-fx sensitivity`: rank weights and activations by the damage that few bits do to the output."""

from __future__ import annotations

import argparse
import json

from repquant_fx.cli.common import (
    MOST_TRIES,
    add_calibration,
    add_source,
    calibration_from,
    count,
    read_bits,
    source_from,
)
from repquant_fx.cli.method import add_method, recipe_from


def add(command: argparse.ArgumentParser) -> None:
    """The options of `sensitivity`."""
    command.set_defaults(run=run)
    add_source(command)
    add_calibration(command)
    analysis = command.add_argument_group("analysis")
    analysis.add_argument(
        "--bits", metavar="B,B,...", help="measure these bits too, e.g. 2,3,4,6,8 (default: the recipe's alone)"
    )
    analysis.add_argument(
        "--loss",
        choices=("error", "kl"),
        default="error",
        help="noise of the output over its power, or, of logits, divergence of the predictions (default error)",
    )
    analysis.add_argument("--probes", type=count(MOST_TRIES), default=4,
                        help="random directions; more make estimates less noisy (default 4)")
    analysis.add_argument("--top", type=count(10**9), help="show only so many")
    add_method(command)


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    recipe, source, calibration = recipe_from(options), source_from(options), calibration_from(options)
    bits = None if options.bits is None else read_bits("--bits", options.bits)
    from repquant_fx import log
    from repquant_fx.preparation import prepare
    from repquant_fx.sensitivity.analysis import analyse

    result = analyse(prepare(source, calibration, recipe), recipe, weight_choices=bits, activation_choices=bits,
                     loss=options.loss, probes=options.probes, seed=calibration.seed)
    log.result({"units": len(result.units), "loss": result.loss, "worst": [unit.name for unit in result.ranking()[:5]]})
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    print(result.table(options.top))
    what = "divergence of the predictions" if options.loss == "kl" else "SQNR of the model's output"
    log.info(f"{what} with one activation or weight quantized, estimated from {result.samples} samples; own dB is the "
             "SQNR of the activation itself, or of the layer's output")
    return 0
