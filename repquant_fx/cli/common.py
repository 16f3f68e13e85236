"""What the commands share: the parser class, the options that name a model, and small readers of values."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NoReturn

from repquant_fx.errors import InputError
from repquant_fx.frontends.tasks import TASKS
from repquant_fx.options import Calibration, Source
from repquant_fx.security.channel import LOAD_SECONDS
from repquant_fx.security.escape import printable

SOURCES = (
    "a file (.pt2, .pt, .safetensors), a transformers directory, hf:OWNER/NAME, "
    "or timm:NAME or torchvision:NAME, with [,key=value...][,pretrained]"
)

MOST_SAMPLES, MOST_TOKENS, MOST_TRIES = 10_000_000, 10_000_000, 10_000  # more is a slip of the finger
MOST_THREADS = max(64, 8 * (os.cpu_count() or 1))


class Parser(argparse.ArgumentParser):
    """Reports wrong options like every other bad input, in a line; options have one name each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}{self._nearest(message)}; see {self.prog} --help")

    def _nearest(self, message: str) -> str:
        """What a word that nobody knows may have meant: an option of any command, or a command."""
        unknown = re.search(r"unrecognized arguments: (-\S+)|invalid choice: '([^']*)'", message)
        if unknown is None:
            return ""
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(p for action in commands for p in action.choices.values())]
        if unknown.group(1):
            words = {option for each in parsers for option in each._option_string_actions}
        else:
            named = re.match(r"argument (\S+?):", message)
            words = {str(choice) for a in self._actions if a.choices and named
                     and named.group(1) in (*a.option_strings, a.metavar, a.dest) for choice in a.choices}
        close = difflib.get_close_matches((unknown.group(1) or unknown.group(2)).partition("=")[0], sorted(words), n=1)
        return f"; did you mean {close[0]}?" if close else ""


def add_source(command: argparse.ArgumentParser, about: str = SOURCES) -> None:
    """The model, and what every command that loads one takes."""
    command.add_argument("model", help=about)
    command.add_argument("--arch", help="architecture of a state dict, e.g. timm:vit_small_patch16_224,num_classes=10")
    command.add_argument(
        "--allow-pickle", action="store_true", help="load files that execute code; only for files you trust"
    )
    command.add_argument(
        "--load-timeout",
        type=seconds,
        metavar="SECONDS",
        default=LOAD_SECONDS,
        help=f"that loading, or capturing, may take without --allow-pickle (default {LOAD_SECONDS:g})",
    )
    command.add_argument("--seed", type=seed, default=0, help="chooses samples and every random number (default 0)")
    add_output(command)


def add_output(command: argparse.ArgumentParser) -> None:
    """How a command speaks; every command that does work takes these."""
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--quiet", action="store_true", help="on stderr only warnings and errors, no progress")
    form.add_argument("--verbose", action="store_true", help="on stderr also every stage and its seconds")
    form.add_argument(
        "--log-json",
        action="store_true",
        help="on stderr one JSON object per line: stage_started, stage_finished, info, warning, result, error",
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks and warnings of libraries")


def add_task(command: argparse.ArgumentParser) -> None:
    """The task of a transformers model."""
    command.add_argument("--task", metavar="TASK", choices=tuple(TASKS),
                         help=f"of a transformers model: {', '.join(TASKS)} (deduced by default)")


def add_calibration(command: argparse.ArgumentParser) -> None:
    """What a model is run on, for every command that calibrates."""
    command.add_argument(
        "--input-shape", metavar="C,H,W", help="shape of one input without the batch, where the model does not tell"
    )
    add_task(command)
    data = command.add_argument_group("calibration")
    data.add_argument(
        "--calib", help="image folder, .npy/.npz/.pt/.safetensors tensors, .txt/.jsonl text, or module:callable"
    )
    data.add_argument("--calib-samples", type=count(MOST_SAMPLES),
                      help="default 1024, of text 128; fewer if there are fewer")
    data.add_argument("--seq-len", type=count(MOST_TOKENS),
                      help="tokens of a calibration sequence (default 128, fewer if the model takes fewer)")
    data.add_argument(
        "--tokenizer", metavar="DIR", help="directory of a transformers tokenizer, where the model brings none"
    )
    data.add_argument("--batch-size", type=count(MOST_SAMPLES), default=32, help="default 32")


def source_from(options: argparse.Namespace) -> Source:
    """The model that `add_source` and `add_calibration` name.

    Raises:
        InputError: a wrong --input-shape.
    """
    return Source(options.model, options.arch, read_shape(options.input_shape), options.allow_pickle, options.task,
                  offload_dir=getattr(options, "offload_dir", None))


def calibration_from(options: argparse.Namespace) -> Calibration:
    """The data that `add_calibration` names, and --seed."""
    return Calibration(options.calib, options.calib_samples, options.batch_size, options.seed, options.seq_len,
                       options.tokenizer)


def read_bits(option: str, text: str) -> list[int]:
    """Bits such as `2,4,8`.

    Raises:
        InputError: not integers from 2 to 8.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part in ("2", "3", "4", "5", "6", "7", "8") for part in parts):
        raise InputError(f"{option} takes bits from 2 to 8 such as 2,4,8; found {text!r}")
    return sorted({int(part) for part in parts})


def add_recipe_output(command: argparse.ArgumentParser) -> None:
    """Options of a command that finds a recipe."""
    command.add_argument(
        "--out", required=True, type=Path, help="the recipe to write, .yaml or .toml; give it to compile --recipe"
    )
    command.add_argument("--force", action="store_true", help="replace an existing file")


def recipe_form(options: argparse.Namespace) -> str:
    """In which form the recipe is written to `--out`: `yaml` or `toml`.

    Raises:
        InputError: neither, by its name.
        OutputError: it cannot be written, or is there and `--force` is not given.
    """
    form = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(options.out.suffix.lower())
    if form is None:
        raise InputError(f"--out writes a recipe, .yaml, .yml or .toml; found {options.out}")
    from repquant_fx.files import check_writable

    check_writable(options.out, options.force)
    return form


def tell_recipe(options: argparse.Namespace, found: dict[str, Any], long: Container[str]) -> int:
    """Say that the recipe was written and, on stdout with `--json`, what was found; returns the exit code.

    Args:
        long: keys that are no news.
    """
    from repquant_fx import log

    log.info(f"wrote {options.out}")
    outcome = {"out": str(options.out), **found}
    log.result({key: value for key, value in outcome.items() if key not in long})
    if options.json:
        print(json.dumps(outcome))
    return 0


def seed(text: str) -> int:
    """A seed that torch takes."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2^63 - 1; found {text[:40]!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"a time is a number of seconds above 0; found {text[:40]!r}")
    return value


def count(most: int) -> Callable[[str], int]:
    """A reader of whole numbers from 1 to `most`."""
    def read(text: str) -> int:
        digits = text.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and 1 <= int(digits) <= most):
            raise argparse.ArgumentTypeError(f"expected a whole number, at least 1 and at most {most}; found "
                                             f"{printable(text[:40])!r}")
        return int(digits)
    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """A reader of numbers from `least` to `most`; NaN and infinity are none."""
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}; found "
                                             f"{printable(text[:40])!r}")
        return value
    return read


def read_shape(text: str | None) -> list[int] | None:
    """Sizes such as `3,224,224`.

    Raises:
        InputError: not positive integers.
    """
    if text is None:
        return None
    try:
        sizes = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(s < 1 for s in sizes):
        raise InputError(f"--input-shape takes positive sizes such as 3,224,224; found {text[:80]!r}")
    return sizes
