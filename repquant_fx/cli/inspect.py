"""`repquant-fx inspect`: what was done to every layer of an exported file, or what would be matched in a model."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repquant_fx.cli.common import SOURCES, add_source, add_task, read_shape
from repquant_fx.cli.method import add_method, recipe_from
from repquant_fx.errors import InputError
from repquant_fx.recipe_settings import FLOAT
from repquant_fx.security.escape import printable

if TYPE_CHECKING:
    from repquant_fx.inspection import Inspection, Row

PIPE_WIDTH = 240  # columns where stdout is no terminal
WIDE = 140  # columns that the whole table needs


def add(command: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    command.set_defaults(run=run)
    add_source(command, f"an exported .onnx; or what is not compiled yet: {SOURCES}")
    command.add_argument(
        "--input-shape", metavar="C,H,W", help="shape of one input without the batch, where the model does not tell"
    )
    add_task(command)
    command.add_argument(
        "--html", type=Path, metavar="FILE", help="write it as one self-contained page, too (needs plotly)"
    )
    command.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="the report that compile --report wrote: the page shows what was measured",
    )
    command.add_argument("--force", action="store_true", help="replace an existing page")
    add_method(command)


def run(options: argparse.Namespace) -> int:
    """Inspect and print; returns the exit code."""
    recipe, shape = recipe_from(options), read_shape(options.input_shape)
    measured = None
    if options.html is not None:
        from repquant_fx.html.stored import read_report

        measured = read_report(options.report) if options.report is not None else None
        check_page(options, measured is not None)
    elif options.report is not None:
        raise InputError("--report is for the page: give --html, too")
    from repquant_fx import log
    from repquant_fx.inspection import inspect

    inspection = inspect(
        options.model,
        recipe,
        arch=options.arch,
        input_shape=shape,
        allow_pickle=options.allow_pickle,
        task=options.task,
    )
    log.finish()
    if options.html is not None:
        from repquant_fx.files import write_atomically
        from repquant_fx.html import inspection_page, page

        text = (
            inspection_page(inspection, command=options.command_line)
            if measured is None
            else page(measured, measured.get("statistics"))
        )
        write_atomically(options.html, text.encode())
        log.info(f"wrote {options.html}")
    log.result(inspection.about)
    if options.json:
        print(json.dumps(inspection.to_dict()))
    else:
        try:
            show(inspection)
        except SystemExit as stop:  # so the tables' library ends a program whose reader is gone
            raise BrokenPipeError from stop
    return 0


def check_page(options: argparse.Namespace, figures: bool) -> None:
    """Refuse a page that cannot be written before anything is loaded.

    Raises:
        OutputError, InputError: see `files`; or it would replace the model, or there is no plotly.
    """
    from repquant_fx.files import check_writable
    from repquant_fx.html import plotly_script

    if options.html.resolve() == Path(options.model).resolve():
        raise InputError("--html names the model itself")
    check_writable(options.html, options.force)
    if figures:
        plotly_script()


def show(inspection: Inspection) -> None:
    """Tables for a terminal: the sites, what was left alone, totals. Long because it is a row of printed lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False)
    wide = console.width >= WIDE  # else what was rewritten stands below the table, once for all sites that it holds for
    words = ["site", "kind", "bits"] + (
        ["grid", "scale", "zero point", "fused", "size"] if inspection.compiled else ["parameters"]
    )
    words += ["rewritten"] if wide else []
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(
            word,
            justify="right" if word in ("scale", "zero point", "size", "parameters") else "left",
            overflow="fold",
            no_wrap=word in ("bits", "scale", "zero point", "size", "kind", "grid", "fused"),
        )
    said: list[str] = []
    below: dict[str, list[str]] = {}
    for row in inspection.rows:
        notes = "" if row.rewritten == said else "; ".join(row.rewritten)
        said = row.rewritten
        for note in row.rewritten:
            below.setdefault(note, []).append(row.site)
        grid = row.grid if wide else _short(row.grid)
        middle = (
            [grid, _numbers(row.scale), _numbers(row.zero_point), _fused(row), _size(row.bytes)]
            if inspection.compiled
            else [f"{row.parameters:,}" if row.parameters else ""]
        )
        kind = row.kind if wide else row.kind.replace(" → ", "→")
        table.add_row(
            *(Text(printable(cell)) for cell in (_name(row), kind, _bits(row), *middle, *([notes] if wide else [])))
        )
    console.print(table)
    console.print()
    if below and not wide:
        console.print(Text("rewritten", style="bold"))
        for note, sites in below.items():
            console.print(
                Text(printable(f"{sites[0]}{f' and {len(sites) - 1} more' if len(sites) > 1 else ''}: {note}"))
            )
        console.print()
    if inspection.left_alone:
        left = Table(
            box=None,
            pad_edge=False,
            header_style="bold",
            padding=(0, 2, 0, 0),
            title="left alone",
            title_justify="left",
        )
        for word in ("operator", "module", "reason"):
            left.add_column(word, overflow="fold")
        for item in inspection.left_alone:
            left.add_row(*(Text(printable(item[key])) for key in ("operator", "path", "reason")))
        console.print(left)
        console.print()
    for line in totals(inspection):
        console.print(Text(printable(line)), soft_wrap=True)


def totals(inspection: Inspection) -> list[str]:
    """A few lines below the tables."""
    about = inspection.about
    kinds = ", ".join(f"{count} {kind}" for kind, count in about["kinds"].items())
    lines = [f"{about['weighted_layers']} weighted layers and {about['products']} products read {about['sites']} "
             f"quantized sites ({kinds}); {len(inspection.left_alone)} operators left alone; "
             f"{about['quantized_parameters']:,} weights"]
    if not inspection.compiled:
        return [f"{inspection.source}: what `compile` would do, {about['bits']}", *lines]
    if about["integer_sites"] is None:
        lines.append("fused under ONNX Runtime: not known (?)")
    else:
        audited = sum(row.integer is not None for row in inspection.rows)
        alone = all(row.bits == FLOAT for row in inspection.rows)
        how = "multiplied by the codes of weights (MatMulNBits)" if alone else "computed with integers"
        lines.append(f"{how} by {about.get('audited_in', 'ONNX Runtime')}: {about['integer_sites']} of {audited}")
        reasons = Counter(row.reason for row in inspection.rows if row.integer is False)
        lines += [f"  {count} not: {reason or 'for no audited reason'}" for reason, count in reasons.items()]
    lines.append(
        f"file {_size(about['file_bytes'])}: weights {_size(about['quantized_bytes'])}, other constants "
        f"{_size(about['other_bytes'])}; "
        f"in float {_size(about['float_bytes'])}, {about['float_bytes'] / max(about['file_bytes'], 1):.2f} times as "
        "much"
    )
    head = f"{inspection.source}: {about['bits']}, {about['method']}, written by repquant-fx {about['version']} "
    head += f"for {about['target']}, opset {about['opset']}"
    return [head, *lines]


def _name(row: Row) -> str:
    """The site; of several layers the first and the last parts of the others: `attn.q_proj/input (also k_proj,
    v_proj)`.
    """
    others = [path.rsplit(".", 1)[-1] for path in row.layers[1:]]
    return row.site + (f" (also {', '.join(others)})" if others else "")


def _bits(row: Row) -> str:
    weights = "/".join(str(bits) for bits in dict.fromkeys(row.weight_bits))
    return f"W{weights}A{row.bits}" if weights else f"A{row.bits}"


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return f"{_numbers(min(value))}…{_numbers(max(value))} ×{len(value)}" if value else ""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _fused(row: Row) -> str:
    return "?" if row.integer is None else "yes" if row.integer else "no"


def _short(grid: str) -> str:
    """`log2, 4 codes per octave` as `log2 ×4`."""
    return re.sub(r"log2, (\d+) codes? \w+ octave", r"log2 ×\1", grid)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} B"
