"""`repquant-fx generate`: continue a text with an exported causal language model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from repquant_fx.cli.common import MOST_THREADS, MOST_TOKENS, add_output, count, number, seconds, seed
from repquant_fx.options import Source
from repquant_fx.security.channel import LOAD_SECONDS


def add(command: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    command.set_defaults(run=run, allow_pickle=False)
    command.add_argument("model", help="what compile wrote of a causal language model: an .onnx, or a directory")
    command.add_argument("prompt", help="the beginning of the text")
    command.add_argument("--tokens", type=count(MOST_TOKENS), default=64, help="how many at most (default 64)")
    command.add_argument("--temperature", type=number(0, 100), default=0.0,
                         help="0 takes the likeliest token, more draws (default 0)")
    command.add_argument("--seed", type=seed, default=0, help="of what is drawn (default 0)")
    command.add_argument("--threads", type=count(MOST_THREADS), help="threads of the runtime")
    command.add_argument("--tokenizer", metavar="DIR",
                         help="directory of a transformers tokenizer (default: beside the model)")
    command.add_argument("--beside", metavar="SOURCE",
                         help="the float model, as compile takes it: its text and speed, too")
    command.add_argument("--load-timeout", type=seconds, metavar="SECONDS", default=LOAD_SECONDS,
                         help=f"that loading it may take (default {LOAD_SECONDS:g})")
    add_output(command)


def run(options: argparse.Namespace) -> int:
    """Generate and print; returns the exit code."""
    from repquant_fx import log
    from repquant_fx.evaluation.perplexity import prefix_of
    from repquant_fx.evaluation.text import check_vocabulary, tokenize, tokenizer_for
    from repquant_fx.generation import exported_runner, float_runner, generate
    from repquant_fx.security.escape import printable

    log.stage("generate")
    runners = {"model": exported_runner(options.model, options.threads)}
    tokenizer = tokenizer_for(runners["model"], options.tokenizer)
    if options.beside is not None:
        runners["float"] = float_runner(Source(options.beside), options.threads)
    prompt = prefix_of(tokenizer) + tokenize(tokenizer, [options.prompt], add_special_tokens=False)[0]
    check_vocabulary(runners["model"], [prompt])
    result: dict[str, Any] = {"prompt": options.prompt}
    for name, runner in runners.items():
        found = generate(runner, prompt, options.tokens, temperature=options.temperature, seed=options.seed,
                         ends=[tokenizer.eos_token_id])
        text = tokenizer.decode([*prompt, *found.tokens], skip_special_tokens=True)
        result[name] = {"text": text, "tokens": found.tokens, "prompt_seconds": found.prompt_seconds,
                        "tokens_per_second": found.tokens_per_second}
    log.finish()
    log.result(result)
    if options.json:
        print(json.dumps(result))
        return 0
    for name in runners:
        given = result[name]
        print(f"{name}: {given['tokens_per_second']:.1f} tokens per second")
        print("\n".join(map(printable, given["text"].splitlines())))
    return 0
