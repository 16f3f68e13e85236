"""`repquant-fx search`: choose bits for each layer and write them as a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from repquant_fx.cli.common import (
    MOST_TRIES,
    add_calibration,
    add_recipe_output,
    add_source,
    calibration_from,
    count,
    number,
    read_bits,
    recipe_form,
    source_from,
    tell_recipe,
)
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError
from repquant_fx.options import Evaluation, Source


def add(command: argparse.ArgumentParser) -> None:
    """The options of `search`."""
    command.set_defaults(run=run)
    add_source(command)
    add_recipe_output(command)
    add_calibration(command)
    target = command.add_argument_group("target (one of the first three)")
    target.add_argument(
        "--target-size", metavar="SIZE", help="of the weights at most: 400kB, 1.5MB, or 3.5b for bits per weight"
    )
    target.add_argument("--target-sqnr", metavar="DB", type=number(-1000, 1000),
                        help="of the output on held-back samples at least; smallest size, measured")
    target.add_argument("--max-drop", metavar="POINTS", type=number(0, 1e6),
                        help="accuracy or 100 x Spearman that may be lost against float on --data, or "
                        "percent of perplexity gained; smallest size, measured")
    target.add_argument("--data", help="for --max-drop: what repquant-fx evaluate takes")
    target.add_argument("--limit", type=count(10**12), help="of --data: evaluate a random subset of this size")
    target.add_argument(
        "--count",
        choices=("stored", "information"),
        default="stored",
        help="size as the file stores it (up to 4 bits take 4, more take 8), or as bits alone (default stored)",
    )
    space = command.add_argument_group("choices")
    space.add_argument("--choices", metavar="B,B,...", default="2,3,4,6,8", help="bits of weights (default 2,3,4,6,8)")
    space.add_argument("--mean-abits", type=number(2, 8),
                        help="let bits of activations vary too, with this mean (default: all as the recipe says)")
    space.add_argument(
        "--activation-choices", metavar="B,B,...", default="2,3,4,6,8", help="for --mean-abits (default 2,3,4,6,8)"
    )
    space.add_argument(
        "--loss", choices=("error", "kl"), default="error", help="see repquant-fx sensitivity (default error)"
    )
    space.add_argument("--probes", type=count(MOST_TRIES), default=4, help="likewise (default 4)")
    space.add_argument("--trials", type=count(MOST_TRIES), default=8,
                        help="models compiled at most, for --target-sqnr and --max-drop (default 8)")
    space.add_argument("--no-trial", dest="trial", action="store_false",
                       help="for --target-size: give what was searched without compiling it beside uniform bits")
    add_method(command)


def run(options: argparse.Namespace) -> int:
    """Search, write, summarise; returns the exit code."""
    recipe, source, calibration = recipe_from(options), source_from(options), calibration_from(options)
    weight_bits = read_bits("--choices", options.choices)
    activation_bits = read_bits("--activation-choices", options.activation_choices)
    if sum(t is not None for t in (options.target_size, options.target_sqnr, options.max_drop)) != 1:
        raise InputError("give one of --target-size, --target-sqnr and --max-drop")
    if (options.max_drop is None) != (options.data is None):
        raise InputError("--max-drop needs --data to measure on, and --data is for --max-drop alone")
    if not options.trial and options.target_size is None:
        raise InputError("--no-trial is for --target-size alone: the other targets are met by trials")
    form = recipe_form(options)
    from repquant_fx import log
    from repquant_fx.files import write_atomically
    from repquant_fx.sensitivity.frontier import Choices
    from repquant_fx.sensitivity.search import Target, search_recipe

    quality, at_least = (None, None) if options.max_drop is None else _measured(options)
    result = search_recipe(source, calibration, recipe,
                           Target(options.target_size, options.target_sqnr, quality, at_least),
                           Choices(weight_bits, activation_bits, options.mean_abits, options.count),
                           loss=options.loss, probes=options.probes, trials=options.trials, trial=options.trial)
    write_atomically(options.out, result.to_text(form).encode())
    for line in str(replace(result, verdict=None) if result.fallback else result).splitlines():  # a warning said it
        log.info(line)
    for trial in result.trials if options.target_size is None else ():  # the verdict has those of a size
        log.info(
            f"tried {trial.bits_per_weight:.2f} bits: {trial.quality:.4g}, "
            f"{'enough' if trial.accepted else 'too little'}"
        )
    return tell_recipe(options, result.to_dict(), ("recipe", "units"))


def _measured(options: argparse.Namespace) -> tuple[Callable[[Any], float], float]:
    """A measure of compiled models on the data, larger is better, and what it must reach."""
    from repquant_fx.evaluation import METRICS, Accuracy, Perplexity, Similarity, deduce_metric, measure
    from repquant_fx.files import scratch

    metric = deduce_metric(Path(options.data))
    wanted = "tokenizer" in METRICS[metric].options
    how = Evaluation(options.data, limit=options.limit, seed=options.seed,
                     tokenizer=options.tokenizer or _tokenizer_of(options.model) if wanted else None)

    def score(source: Source) -> float:
        result = measure(source, how)
        if isinstance(result, Perplexity):
            return -result.perplexity
        if isinstance(result, Similarity):
            return 100 * result.spearman
        assert isinstance(result, Accuracy)  # what other metrics need, a search is not given
        return result.top1

    def quality(compiled: Any) -> float:
        with scratch() as folder:
            return score(Source(compiled.save(folder / "trial.onnx")))

    best = score(Source(options.model, options.arch, allow_pickle=options.allow_pickle))
    return quality, best * (1 + options.max_drop / 100) if metric == "perplexity" else best - options.max_drop


def _tokenizer_of(model: str) -> str | None:
    """The directory of a transformers model with a tokenizer: a trial is measured in a folder that has none."""
    from repquant_fx.frontends.huggingface import find_directory, is_huggingface
    from repquant_fx.frontends.tokenizer import has_tokenizer

    folder = find_directory(model) if is_huggingface(model) else None
    return str(folder) if folder is not None and has_tokenizer(folder) else None
