"""`repquant-fx lm-eval`: zero-shot and few-shot tasks of lm_eval with a language model or an exported file."""

from __future__ import annotations

import argparse
import json

from repquant_fx.cli.common import MOST_SAMPLES, MOST_THREADS, MOST_TOKENS, add_source, count
from repquant_fx.errors import InputError
from repquant_fx.options import Source


def add(command: argparse.ArgumentParser) -> None:
    """The options of `lm-eval`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument("--tasks", required=True, metavar="NAMES", help="such as piqa,arc_easy,hellaswag,winogrande")
    command.add_argument("--include", metavar="DIR",
                         help="tasks of your own, in lm_eval's format; such files may run code")
    command.add_argument("--download", action="store_true",
                         help="fetch data sets that are not in the cache; else the network is not used")
    command.add_argument("--shots", type=count(MOST_SAMPLES),
                         help="solved examples before each question (default: as the task says)")
    command.add_argument("--limit", type=count(10**9), help="questions of each task, the first")
    command.add_argument("--batch-size", type=count(MOST_SAMPLES), default=1, help="default 1")
    command.add_argument("--threads", type=count(MOST_THREADS), help="threads of the runtime")
    command.add_argument(
        "--tokenizer", metavar="DIR", help="directory of a transformers tokenizer (default: beside the model)"
    )
    command.add_argument("--seq-len", type=count(MOST_TOKENS),
                         help="longer texts lose their beginning (default: as long as the model takes, at most 2048)")


def run(options: argparse.Namespace) -> int:
    """Run the tasks and print their scores; returns the exit code."""
    from repquant_fx import log
    from repquant_fx.evaluation.harness import run_tasks
    from repquant_fx.evaluation.runners import open_runner, torch_threads

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task")
    log.stage("evaluate")
    with torch_threads(options.threads):
        source = Source(options.model, options.arch, allow_pickle=options.allow_pickle, task="causal-lm")
        runner = open_runner(source, options.threads)
        found = run_tasks(runner, names, include=options.include, shots=options.shots, limit=options.limit,
                          batch_size=options.batch_size, seq_len=options.seq_len, tokenizer=options.tokenizer,
                          download=options.download, seed=options.seed)
    log.finish()
    outcome = {"model": options.model, "tasks": found.tasks}
    log.result(outcome)
    print(json.dumps(outcome) if options.json else found)
    return 0
