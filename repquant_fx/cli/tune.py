"""`repquant-fx tune`: time the forms of a recipe on this machine and write the fastest as a recipe."""

from __future__ import annotations

import argparse

from repquant_fx.cli.common import (
    MOST_SAMPLES,
    MOST_THREADS,
    MOST_TRIES,
    add_calibration,
    add_recipe_output,
    add_source,
    calibration_from,
    count,
    number,
    recipe_form,
    seconds,
    source_from,
    tell_recipe,
)
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.targets import DEFAULT, TIMED


def add(command: argparse.ArgumentParser) -> None:
    """The options of `tune`."""
    command.set_defaults(run=run)
    add_source(command)
    add_recipe_output(command)
    add_calibration(command)
    runs = command.add_argument_group("what is timed")
    runs.add_argument("--target", choices=TIMED, default=DEFAULT, metavar="NAME",
                      help=f"the runtime that the file will be for, one of {', '.join(TIMED)} (default {DEFAULT})")
    runs.add_argument("--threads", type=count(MOST_THREADS), help="threads of the runtime")
    runs.add_argument("--batch", type=count(MOST_SAMPLES), help="samples of a run (default 1)")
    runs.add_argument("--seconds", type=seconds, default=2.0, help="that each form runs, about (default 2)")
    choice = command.add_argument_group("choice")
    choice.add_argument("--max-drop", metavar="DB", type=number(0, 1000), default=1.0,
                        help="SQNR of the output on held-back samples that may be lost against the recipe that it "
                        "starts from (default 1)")
    choice.add_argument("--trials", type=count(MOST_TRIES), default=3,
                        help="combinations compiled at most with all settings of the recipe (default 3)")
    add_method(command)


def run(options: argparse.Namespace) -> int:
    """Time, choose, write, summarise; returns the exit code."""
    recipe, source, calibration = recipe_from(options), source_from(options), calibration_from(options)
    form = recipe_form(options)
    from repquant_fx import log
    from repquant_fx.files import write_atomically
    from repquant_fx.tuning import Conditions
    from repquant_fx.tuning.tuner import tune_recipe

    result = tune_recipe(source, calibration, recipe, Conditions(
        options.target, options.threads, options.batch, options.max_drop, options.seconds, options.trials))
    write_atomically(options.out, result.to_text(form).encode())
    for line in (result.table() if result.fallback else str(result)).splitlines():  # a warning said it
        log.info(line)
    return tell_recipe(options, result.to_dict(), ("recipe", "forms"))
