"""The command line: one module a command, each with `add(parser)` and `run(options)`.

Exit codes: see EXIT_CODES. stdout carries the result and nothing else; all other messages go to stderr (see `repquant_fx.log`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from repquant_fx import log
from repquant_fx.cli import compile, completion, evaluate, inspect, recipe, search, sensitivity, signals
from repquant_fx.cli.common import Parser
from repquant_fx.errors import RepQuantError, RepQuantWarning, is_failure, is_out_of_memory
from repquant_fx.version import VERSION

COMMANDS = {"compile": compile, "evaluate": evaluate, "inspect": inspect, "recipe": recipe, "sensitivity": sensitivity, "search": search,
            "completion": completion}
EXIT_CODES = "exit codes: 0 done; 1 internal error, a bug; 2 bad input: one message, nothing written; 3 the exported file disagrees with " \
    "the reference, nothing written; 130 interrupted (SIGINT), 143 terminated (SIGTERM), 129 hung up (SIGHUP), nothing written; " \
    "141 nobody reads stdout any more"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser())
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # wrong options are reported in the form asked for, too
    with log.using(next((form for form in log.FORMS if f"--{_switch(form)}" in arguments), log.NORMAL)):
        try:
            options = parser().parse_args(arguments)
            options.command_line = shlex.join(["repquant-fx", *arguments])
            with warnings.catch_warnings():
                if not debug:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", RepQuantWarning)
                    warnings.showwarning = _show_warning
                with signals.terminated(), signals.flushed():
                    return int(options.run(options))
        except RepQuantError as error:
            if debug:
                traceback.print_exc()
            log.error(f"error: {error}", type(error).__name__, error.exit_code)
            return error.exit_code
        except KeyboardInterrupt:
            log.error("interrupted; nothing was written", "KeyboardInterrupt", 130)
            return 130
        except signals.Terminated as stop:
            log.error(f"terminated by {stop.name}; nothing was written", "Terminated", stop.exit_code)
            return stop.exit_code
        except BrokenPipeError:  # who reads has enough
            return 141
        except BaseException as error:
            if not is_failure(error):
                raise
            if debug:
                traceback.print_exc()
            if is_out_of_memory(error):
                log.error(f"error: not enough memory ({str(error).splitlines()[0][-200:] if str(error) else 'MemoryError'}); take smaller batches "
                          "(--batch-size), fewer samples (--calib-samples) or smaller inputs", type(error).__name__, 2)
                return 2
            log.error(f"internal error: {type(error).__name__}: {error}", type(error).__name__, 1,
                      "This is a bug; please report it with the output of the same command and --debug.")
            return 1


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = Parser(prog="repquant-fx", description="Post-training quantization of transformers: torch.fx in, ONNX QDQ out.", epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"repquant-fx {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").split(": ", 1)[1].split("\n")[0].rstrip(".")
        module.add(commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=EXIT_CODES))
    return top


def _switch(form: str) -> str:
    return "log-json" if form == log.JSON else form


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    log.warning(str(message))
