"""`repquant-fx evaluate`: accuracy, perplexity, similarity, zero-shot accuracy or COCO's average precision of a model
or a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from repquant_fx.cli.common import MOST_SAMPLES, MOST_THREADS, MOST_TOKENS, add_source, count
from repquant_fx.errors import InputError
from repquant_fx.options import Evaluation, Source


def add(command: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument(
        "--data", required=True, help="class folders of images, a text, sentence pairs (.csv, .tsv, .jsonl), or the "
        "folder of the images of --coco"
    )
    command.add_argument(
        "--metric",
        choices=("accuracy", "perplexity", "similarity", "zero-shot", "detection", "box-prompts"),
        help="deduced from the data by default",
    )
    command.add_argument("--batch-size", type=count(MOST_SAMPLES), help="default 64; of windows of text 1")
    command.add_argument("--limit", type=count(10**12),
                        help="evaluate a random subset of this size; of a text, the first windows")
    command.add_argument("--threads", type=count(MOST_THREADS), help="threads of the runtime")
    command.add_argument(
        "--module",
        metavar="PATH=FILE",
        action="append",
        default=[],
        help="run a module of the model by a file that compile --module PATH wrote; may be given again",
    )
    coco = command.add_argument_group("objects")
    coco.add_argument("--coco", metavar="FILE", help="annotations in COCO's format: AP of boxes and masks")
    coco.add_argument("--boxes", metavar="FILE",
                      help="what a detector found, in COCO's format of results, to prompt a model such as SAM with")
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
    given = {field.name: getattr(options, field.name) for field in fields(Evaluation) if field.name != "modules"}
    how = Evaluation(**given, modules=_modules(options.module))
    result = measure(Source(options.model, options.arch, allow_pickle=options.allow_pickle), how)
    log.finish()
    log.result({"model": options.model, **asdict(result)})
    print(json.dumps({"model": options.model, **asdict(result)}) if options.json else result)
    return 0


def _modules(given: Sequence[str]) -> dict[str, str]:
    """Files by the paths of modules.

    Raises:
        InputError: an option is not PATH=FILE.
    """
    pairs = [text.partition("=") for text in given]
    if wrong := next((text for text, (path, _, file) in zip(given, pairs) if not path or not file), None):
        raise InputError(f"--module {wrong[:80]}: expected PATH=FILE, such as backbone=backbone.onnx")
    return {path: file for path, _, file in pairs}
