"""`repquant-fx evaluate`: accuracy, perplexity, similarity or zero-shot accuracy of a model or an exported file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields

from repquant_fx.cli.common import MOST_SAMPLES, MOST_THREADS, MOST_TOKENS, add_source, count
from repquant_fx.options import Evaluation, Source


def add(command: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument(
        "--data", required=True, help="class folders of images, a text, or sentence pairs (.csv, .tsv, .jsonl)"
    )
    command.add_argument(
        "--metric",
        choices=("accuracy", "perplexity", "similarity", "zero-shot"),
        help="deduced from the data by default",
    )
    command.add_argument("--batch-size", type=count(MOST_SAMPLES), help="default 64; of windows of text 1")
    command.add_argument("--limit", type=count(10**12),
                        help="evaluate a random subset of this size; of a text, the first windows")
    command.add_argument("--threads", type=count(MOST_THREADS), help="threads of the runtime")
    text = command.add_argument_group("text")
    text.add_argument(
        "--tokenizer", metavar="DIR", help="directory of a transformers tokenizer (default: beside the model)"
    )
    text.add_argument("--seq-len", type=count(MOST_TOKENS),
                      help="tokens of a window, of a sentence or of a prompt (default: as long as the model takes, "
                      "at most 2048)")
    text.add_argument("--stride", type=count(MOST_TOKENS),
                      help="tokens from one window to the next (default: half a window)")
    text.add_argument(
        "--separator", metavar="TEXT", help="what stands between the documents of a text, such as '<|endoftext|>'"
    )
    text.add_argument(
        "--prompts",
        metavar="FILE|TEMPLATE",
        help="for zero-shot: JSON {class folder: [prompt, ...]}, or 'a photo of a {}'",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code."""
    from repquant_fx import log
    from repquant_fx.evaluation import measure

    log.stage("evaluate")
    how = Evaluation(**{field.name: getattr(options, field.name) for field in fields(Evaluation)})
    result = measure(Source(options.model, options.arch, allow_pickle=options.allow_pickle), how)
    log.finish()
    log.result({"model": options.model, **asdict(result)})
    print(json.dumps({"model": options.model, **asdict(result)}) if options.json else result)
    return 0
