"""`repquant-fx compile`: quantize a model and write it as ONNX."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repquant_fx.cli.common import add_source, read_shape
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError

TASKS = "of a transformers model: image-classification, text-classification, masked-lm, causal-lm, feature-extraction, " \
    "zero-shot-image-classification, image-segmentation, object-detection or mask-generation (deduced by default)"
LONG = ("layers", "parity", "recipe")  # parts of the report that are no news


def add(command: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument("--out", required=True, type=Path, help="a name that ends in .onnx: the file to write; any other name: a directory "
                         "that gets model.onnx and, of a transformers or timm model, its configuration, tokenizer and processor")
    command.add_argument("--force", action="store_true", help="replace existing output files")
    command.add_argument("--report", type=Path, help="write a JSON report, layer by layer")
    command.add_argument("--input-shape", metavar="C,H,W", help="shape of one input without the batch, where the model does not tell")
    command.add_argument("--task", help=TASKS)
    data = command.add_argument_group("calibration")
    data.add_argument("--calib", help="image folder, .npy/.npz/.pt/.safetensors tensors, .txt/.jsonl text, or module:callable")
    data.add_argument("--calib-samples", type=int, help="default 1024, of text 128; fewer if there are fewer")
    data.add_argument("--seq-len", type=int, help="tokens of a calibration sequence (default 128, fewer if the model takes fewer)")
    data.add_argument("--tokenizer", metavar="DIR", help="directory of a transformers tokenizer, where the model brings none")
    data.add_argument("--batch-size", type=int, default=32, help="default 32")
    add_method(command)
    command.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                         help="compare ONNX Runtime with the FX reference (default on)")


def run(options: argparse.Namespace) -> int:
    """Compile, save, summarise; returns the exit code."""
    recipe = recipe_from(options)  # cheap checks first: nothing is loaded for a wrong option or an output that cannot be written
    shape = read_shape(options.input_shape)
    check_outputs(options)
    from repquant_fx import log, report
    from repquant_fx.compiler import compile

    compiled = compile(options.model, options.calib, recipe, samples=options.calib_samples, batch_size=options.batch_size,
                       seed=options.seed, arch=options.arch, input_shape=shape, allow_pickle=options.allow_pickle, check=options.check,
                       task=options.task, seq_len=options.seq_len, tokenizer=options.tokenizer)
    out = compiled.save(options.out, force=options.force, report=options.report)
    log.info(report.summary(compiled.report))
    log.info(f"wrote {out} ({compiled.report['file_bytes'] / 1e6:.2f} MB)")
    log.result({"out": str(out), **{key: value for key, value in compiled.report.items() if key not in LONG}})
    if options.json:
        print(json.dumps({"out": str(out), **compiled.report}))
    return 0


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written before anything is loaded.

    Raises:
        OutputError, InputError: see `files`; or two outputs with one name.
    """
    from repquant_fx.files import MODEL, check_directory, check_writable, is_directory

    folder = is_directory(options.out)
    if folder:
        check_directory(options.out, [MODEL], options.force)
    else:
        check_writable(options.out, options.force)
    if options.report is None:
        return
    if options.report.resolve() in (options.out.resolve(), (options.out / MODEL).resolve()):
        raise InputError("--out and --report name the same file")
    if not (folder and options.report.parent.resolve() == options.out.resolve() and not options.out.exists()):
        check_writable(options.report, options.force)
