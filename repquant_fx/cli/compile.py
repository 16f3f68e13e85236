"""`repquant-fx compile`: quantize a model and write it as ONNX."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repquant_fx.cli.common import add_source, read_shape
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError

TASKS = "of a transformers model: image-classification, text-classification, masked-lm, causal-lm, feature-extraction, " \
    "zero-shot-image-classification, image-segmentation, object-detection or mask-generation (deduced by default)"


def add(command: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
    command.add_argument("--force", action="store_true", help="replace existing output files")
    command.add_argument("--report", type=Path, help="write a JSON report, layer by layer")
    command.add_argument("--html", type=Path, help="write the report as one self-contained page with figures (needs plotly)")
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
    from repquant_fx.files import check_writable

    check_writable(options.out, options.force)
    written = {options.out.resolve(): "--out"}
    for name, path in (("--report", options.report), ("--html", options.html)):
        if path is not None:
            check_writable(path, options.force)
            if (other := written.setdefault(path.resolve(), name)) != name:
                raise InputError(f"{other} and {name} name the same file")
    if options.html is not None:
        from repquant_fx.html import plotly_script

        plotly_script()  # missing? say so now
    from repquant_fx import report
    from repquant_fx.compiler import compile

    compiled = compile(options.model, recipe, calibration=options.calib, samples=options.calib_samples, batch_size=options.batch_size,
                       seed=options.seed, arch=options.arch, input_shape=shape, allow_pickle=options.allow_pickle, check=options.check,
                       task=options.task, seq_len=options.seq_len, tokenizer=options.tokenizer, statistics=options.html is not None)
    compiled.save(options.out, force=options.force, report=options.report, html=options.html, command=options.command_line)
    print(report.summary(compiled.report), file=sys.stderr)
    print(f"wrote {options.out} ({compiled.report['file_bytes'] / 1e6:.2f} MB)", file=sys.stderr)
    if options.json:
        print(json.dumps({"out": str(options.out), **compiled.report}))
    return 0
