"""`repquant-fx compile`: quantize a model and write it as ONNX."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repquant_fx.cli.common import add_calibration, add_source, calibration_from
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError


def add(command: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
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
    from repquant_fx.files import check_writable

    check_writable(options.out, options.force)
    if options.report is not None:
        check_writable(options.report, options.force)
        if options.report.resolve() == options.out.resolve():
            raise InputError("--out and --report name the same file")
    from repquant_fx import report
    from repquant_fx.compiler import compile

    compiled = compile(options.model, recipe, check=options.check, **source)
    compiled.save(options.out, force=options.force, report=options.report)
    print(report.summary(compiled.report), file=sys.stderr)
    print(f"wrote {options.out} ({compiled.report['file_bytes'] / 1e6:.2f} MB)", file=sys.stderr)
    if options.json:
        print(json.dumps({"out": str(options.out), **compiled.report}))
    return 0
