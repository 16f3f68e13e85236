"""The command line: one module a command, each with `add(parser)` and `run(options)`.

Exit codes: 0 done, 1 internal error, 2 bad input, 3 the exported file disagrees with the reference, 130 interrupted.
Messages go to stderr; `--json` prints one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from repquant_fx.cli import compile, evaluate
from repquant_fx.cli.common import Parser
from repquant_fx.errors import RepQuantError, RepQuantWarning
from repquant_fx.version import VERSION

COMMANDS = {"compile": compile, "evaluate": evaluate}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        options = parser().parse_args(arguments)
        options.command_line = shlex.join(["repquant-fx", *arguments])
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", RepQuantWarning)
                warnings.showwarning = _show_warning
            return int(options.run(options))
    except RepQuantError as error:
        if debug:
            traceback.print_exc()
        print(f"repquant-fx: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("repquant-fx: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"repquant-fx: internal error: {type(error).__name__}: {error}\n"
              "This is a bug; please report it with the output of the same command and --debug.", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = Parser(prog="repquant-fx", description="Post-training quantization of transformers: torch.fx in, ONNX QDQ out.")
    top.add_argument("--version", action="version", version=f"repquant-fx {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").split(": ", 1)[1].split("\n")[0].rstrip(".")
        module.add(commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + "."))
    return top


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"repquant-fx: warning: {message}", file=sys.stderr)
