"""`repquant-fx compile`: quantize a model and write it as ONNX."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repquant_fx.cli.common import add_calibration, add_source, calibration_from
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError

LONG = ("layers", "parity", "recipe")  # parts of the report that are no news


def add(command: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument("--out", required=True, type=Path, help="a name that ends in .onnx: the file to write; any other name: a directory "
                         "that gets model.onnx and, of a transformers or timm model, its configuration, tokenizer and processor")
    command.add_argument("--force", action="store_true", help="replace existing output files")
    command.add_argument("--report", type=Path, help="write a JSON report, layer by layer")
    add_calibration(command)
    add_method(command)
    command.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                         help="compare ONNX Runtime with the FX reference (default on)")


def run(options: argparse.Namespace) -> int:
    """Compile, save, summarise; returns the exit code."""
    recipe = recipe_from(options)  # cheap checks first: nothing is loaded for a wrong option or an output that cannot be written
    source = calibration_from(options)
    check_outputs(options)
    from repquant_fx import log, report
    from repquant_fx.compiler import compile

    compiled = compile(options.model, recipe=recipe, check=options.check, **source)
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
