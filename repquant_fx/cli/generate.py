"""`repquant-fx generate`: continue a text with an exported causal language model, or write what an exported
encoder-decoder makes of it.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from repquant_fx.cli.common import MOST_THREADS, MOST_TOKENS, add_output, count, number, seconds, seed
from repquant_fx.errors import InputError
from repquant_fx.options import Source
from repquant_fx.security.channel import LOAD_SECONDS

if TYPE_CHECKING:
    from repquant_fx.evaluation.runners import Runner
    from repquant_fx.generation import Halves


def add(command: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    command.set_defaults(run=run, allow_pickle=False)
    command.add_argument("model", help="what compile wrote of a causal language model, or of an encoder-decoder that "
                         "reads text: an .onnx, or a directory")
    command.add_argument("prompt", help="the beginning of the text, or the text that an encoder-decoder reads")
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
    from repquant_fx.evaluation.text import check_vocabulary, tokenizer_for
    from repquant_fx.generation import exported_halves, exported_runner, float_runner, generate
    from repquant_fx.security.escape import printable

    log.stage("generate")
    halves = exported_halves(options.model, options.threads)
    reader = exported_runner(options.model, options.threads) if halves is None else halves.encoder
    runners: dict[str, Runner | Halves] = {"model": halves or reader}
    tokenizer = tokenizer_for(reader, options.tokenizer)
    if options.beside is not None:
        if halves is not None:
            raise InputError("--beside is for causal language models; leave it out")
        runners["float"] = float_runner(Source(options.beside), options.threads)
    prompt = prompt_of(tokenizer, options.prompt, halves is None)
    check_vocabulary(reader, [prompt])
    result: dict[str, Any] = {"prompt": options.prompt}
    for name, runner in runners.items():
        found = generate(runner, prompt, options.tokens, temperature=options.temperature, seed=options.seed,
                         ends=[tokenizer.eos_token_id] if halves is None else halves.ends)
        text = tokenizer.decode([*(prompt if halves is None else []), *found.tokens], skip_special_tokens=True)
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


def prompt_of(tokenizer: Any, text: str, continued: bool) -> list[int]:
    """Ids of a text; without the tokens that a tokenizer puts after one where it is to be continued."""
    from repquant_fx.evaluation.perplexity import prefix_of
    from repquant_fx.evaluation.text import tokenize

    if not continued:
        return tokenize(tokenizer, [text])[0]
    return prefix_of(tokenizer) + tokenize(tokenizer, [text], add_special_tokens=False)[0]
