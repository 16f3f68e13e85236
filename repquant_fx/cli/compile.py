"""`repquant-fx compile`: quantize a model and write it as ONNX."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repquant_fx.cli.common import add_calibration, add_source, calibration_from, count, source_from
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError
from repquant_fx.targets import DEFAULT, HIGHEST_OPSET, LOWEST_OPSET, TARGETS, find

if TYPE_CHECKING:
    from repquant_fx.compiled import CompiledModel
    from repquant_fx.encoder_decoder import CompiledHalves

LONG = ("layers", "parity", "runtime", "recipe")  # parts of the report that are no news


def add(command: argparse.ArgumentParser) -> None:
    """The options of `compile`."""
    command.set_defaults(run=run)
    add_source(command)
    command.add_argument(
        "--module",
        metavar="PATH",
        help="compile this module of the model alone, such as backbone, on what reaches it when the whole runs",
    )
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        help="a name that ends in .onnx: the file to write; any other name: a directory "
        "that gets model.onnx and, of a transformers or timm model, its configuration, tokenizer and processor",
    )
    command.add_argument("--force", action="store_true", help="replace existing output files")
    command.add_argument("--report", type=Path, help="write a JSON report, layer by layer")
    command.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the report as one self-contained page with figures (needs plotly)",
    )
    add_calibration(command)
    command.add_argument(
        "--with-past", action=argparse.BooleanOptionalAction, default=None,
        help="a causal language model decodes with a key/value cache, instead of reading whole sequences (default on "
        "where the model keeps such a cache)")
    long = command.add_argument_group("long compiles (under torchrun the processes share the calibration data)")
    long.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="keep finished layers here; the same command goes on after an interruption",
    )
    long.add_argument(
        "--offload-dir",
        type=Path,
        metavar="DIR",
        help="keep values between layers in a temporary file here, not in memory",
    )
    long.add_argument(
        "--device", default="cpu", help="where calibration, clipping and GPTQ compute: cpu (default), cuda, cuda:1, ..."
    )
    add_method(command)
    form = command.add_argument_group("the file")
    form.add_argument("--target", choices=tuple(TARGETS), default=DEFAULT, metavar="NAME",
                      help=f"the runtime it is for, one of {', '.join(TARGETS)} (default {DEFAULT}); `repquant-fx "
                      "targets` says what each takes")
    form.add_argument("--opset", type=count(999), metavar="N",
                      help=f"of its operators, {LOWEST_OPSET} to {HIGHEST_OPSET} (default the target's)")
    form.add_argument("--external-data", action="store_true",
                      help="write its matrices into a data file beside it, as is done past 1.5 GB in any case")
    command.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                         help="compare ONNX Runtime with the FX reference (default on)")


def run(options: argparse.Namespace) -> int:
    """Compile, save, summarise; returns the exit code. Of several processes that torchrun started, the first one
    writes.
    """
    # cheap checks first: nothing is loaded for a wrong option or an output that cannot be written
    recipe = find(options.target, options.opset).recipe(recipe_from(options))
    source, calibration = replace(source_from(options), module=options.module), calibration_from(options)
    check_outputs(options)
    from repquant_fx import log
    from repquant_fx.compiler import compile_model
    from repquant_fx.distributed import joined
    from repquant_fx.encoder_decoder import CompiledHalves, compile_halves, is_encoder_decoder
    from repquant_fx.options import Run

    two = is_encoder_decoder(source)
    if two:
        check_halves(options)

    with joined() as world, log.using(log.QUIET) if world.rank else nullcontext():  # rank 0 speaks
        run = Run(check=options.check, work_dir=options.work_dir, distributed=world.size > 1, device=options.device,
                  statistics=options.html is not None, target=options.target, opset=options.opset,
                  with_past=options.with_past, external_data=options.external_data)
        compile_it = compile_halves if two else compile_model
        compiled = compile_it(source, calibration, recipe, run, out=None if world.rank else options.out)
    if world.rank:
        return 0
    return write_halves(compiled, options) if isinstance(compiled, CompiledHalves) else write(compiled, options)


def write(compiled: CompiledModel, options: argparse.Namespace) -> int:
    """Save a compiled model and summarise it; returns the exit code."""
    from repquant_fx import log

    out = compiled.save(
        options.out, force=options.force, report=options.report, html=options.html, command=options.command_line
    )
    summarise(compiled.report, out, options.verbose)
    log.result({"out": str(out), **news(compiled.report)})
    if options.json:
        print(json.dumps({"out": str(out), **compiled.report}))
    return 0


def write_halves(compiled: CompiledHalves, options: argparse.Namespace) -> int:
    """Save an encoder and a decoder and summarise both; returns the exit code."""
    from repquant_fx import log
    from repquant_fx.files import DECODER, ENCODER

    out = compiled.save(options.out, force=options.force, report=options.report)
    for name, report in ((ENCODER, compiled.report["encoder"]), (DECODER, compiled.report["decoder"])):
        summarise(report, out / name, options.verbose)
    log.result({"out": str(out), **{name: news(report) for name, report in compiled.report.items()}})
    if options.json:
        print(json.dumps({"out": str(out), **compiled.report}))
    return 0


def summarise(report: dict[str, Any], out: Path, verbose: bool) -> None:
    """Say what was written, and how good it is."""
    from repquant_fx import log
    from repquant_fx.report import summary

    for line in summary(report, verbose=verbose).splitlines():
        log.info(line)
    beside = f" and {out.with_name(report['data_file'])}" if "data_file" in report else ""
    log.info(f"wrote {out}{beside} ({report['file_bytes'] / 1e6:.2f} MB)")


def news(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its long parts."""
    return {key: value for key, value in report.items() if key not in LONG}


def check_halves(options: argparse.Namespace) -> None:
    """Refuse what two files cannot be given.

    Raises:
        OutputError, InputError: see `files`; or a page is wanted, which is of one file.
    """
    from repquant_fx.encoder_decoder import check_is_directory
    from repquant_fx.files import DECODER, ENCODER, check_directory

    check_is_directory(options.out)
    if options.html is not None:
        raise InputError("--html is a page of one file, and an encoder-decoder becomes two; give --report, and "
                         "`repquant-fx inspect FILE --html` draws each file")
    check_directory(options.out, [ENCODER, DECODER], options.force)


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written before anything is loaded.

    Raises:
        OutputError, InputError: see `files`; or two outputs with one name, or no plotly for the page.
    """
    from repquant_fx.files import MODEL, check_directory, check_folder, check_writable, is_directory

    for place in (options.work_dir, options.offload_dir):
        if place is not None:
            check_folder(place)
    folder = is_directory(options.out)
    if folder:
        check_directory(options.out, [MODEL], options.force)
    else:
        check_writable(options.out, options.force)
    taken = {options.out.resolve(): "--out", (options.out / MODEL).resolve(): "--out"}
    for switch, path in (("--report", options.report), ("--html", options.html)):
        if path is None:
            continue
        if (other := taken.setdefault(path.resolve(), switch)) != switch:
            raise InputError(f"{other} and {switch} name the same file")
        if not (folder and path.parent.resolve() == options.out.resolve() and not options.out.exists()):
            check_writable(path, options.force)
    if options.html is not None:
        from repquant_fx.html import plotly_script

        plotly_script()
