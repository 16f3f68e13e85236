"""The command line: one module per command, each with `add(parser)` and `run(options)`.

Exit codes: see EXIT_CODES. stdout carries the result and nothing else; all other messages go to stderr (see
`repquant_fx.log`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from repquant_fx import log
from repquant_fx.cli import (
    check,
    compile,
    completion,
    evaluate,
    generate,
    inspect,
    lm_eval,
    recipe,
    search,
    sensitivity,
    signals,
    targets,
    tune,
)
from repquant_fx.cli.common import Parser
from repquant_fx.errors import RepQuantError, RepQuantWarning, is_failure, is_out_of_memory
from repquant_fx.security import channel, confinement
from repquant_fx.security.supervisor import supervise
from repquant_fx.version import VERSION

COMMANDS = {
    "compile": compile,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "generate": generate,
    "inspect": inspect,
    "recipe": recipe,
    "sensitivity": sensitivity,
    "search": search,
    "tune": tune,
    "targets": targets,
    "check": check,
    "completion": completion,
}
EXIT_CODES = (
    "exit codes: 0 done; 1 internal error, a bug; 2 bad input: one message, nothing written; 3 the exported file "
    "disagrees with "
    "the FX reference, nothing written; 130 interrupted (SIGINT), 143 terminated (SIGTERM), 129 hung up (SIGHUP); 141 "
    "nobody reads stdout any "
    "more. What ends after the outputs were written (a signal, a stdout that is full) says so"
)

REPORT = "This is a bug; please report it with the output of the same command and --debug."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: the arguments; they are worked on in this process. Those of the process where None: then a child of it
            does the work (see `security.supervisor`).
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser())
    if argv is not None:
        return _run(list(argv))
    arguments = sys.argv[1:]

    def say(message: str, kind: str, code: int) -> None:
        with log.using(_form(arguments)):
            log.error(message, kind, code)

    return supervise(lambda: _run(arguments), say)


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    channel.begin()
    # wrong options are reported in the form asked for, too
    with log.using(_form(arguments)), signals.encodable():
        try:
            options = parser().parse_args(arguments)
            channel.load_seconds = getattr(options, "load_timeout", channel.LOAD_SECONDS)
            if confined := confinement.confine(options):
                log.detail(f"confined: {', '.join(confined)}")
            options.command_line = shlex.join(["repquant-fx", *arguments])
            with warnings.catch_warnings():
                warnings.showwarning = _show_in_full if debug else _show_warning
                if not debug:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", RepQuantWarning)
                with nullcontext() if channel.supervised() else signals.terminated(), signals.flushed():
                    code = int(options.run(options))
            channel.ask("ending", code=code)
            return code
        except BaseException as error:
            message, advice, code = _explained(error)
            channel.ask("ending", code=code)
            if debug and not isinstance(error, (KeyboardInterrupt, signals.Terminated, BrokenPipeError)):
                log.verbatim(traceback.format_exc())
            if message:
                log.error(message, type(error).__name__, code, advice)
            return code


def _explained(error: BaseException) -> tuple[str, str, int]:
    """What to say of an error, nothing where the reader of stdout is gone; what to do about it, where that takes a
    line; the exit code.

    Raises:
        BaseException: it is no failure, such as the end that --help asks for.
    """
    if isinstance(error, RepQuantError) and not _is_short_of_memory(error):
        return f"error: {error}", "", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {channel.outcome()}", "", 130
    if isinstance(error, signals.Terminated):
        return f"terminated by {error.name}; {channel.outcome()}", "", error.exit_code
    if isinstance(error, BrokenPipeError):  # who reads has enough
        return "", "", 141
    if not is_failure(error):
        raise error
    if _is_short_of_memory(error):
        reason = str(error).splitlines()[-1][-200:] if str(error) else "MemoryError"
        most = confinement.address_space()
        bound = "" if most is None else f"; the address space of the process is limited to {most / 1e9:.1f} GB"
        return (
            f"error: not enough memory ({reason}{bound}); take smaller batches (--batch-size), fewer samples "
            "(--calib-samples) or smaller inputs",
            "",
            2,
        )
    if type(error).__name__ == "GuardOnDataDependentSymNode":  # of torch, which is not imported for its sake
        return "error: a size of the model depends on values; its shapes must follow from its inputs' shapes", "", 2
    return f"internal error: {type(error).__name__}: {error}", REPORT, 1


def _is_short_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, here or in what an error explains."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__
    return False


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = Parser(
        prog="repquant-fx",
        description="Post-training quantization of transformers: torch.fx in, ONNX QDQ out.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"repquant-fx {VERSION}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").split(": ", 1)[1].split("\n")[0].rstrip(".")
        module.add(
            commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=EXIT_CODES)
        )
    return top


def _form(arguments: Sequence[str]) -> str:
    return next((form for form in log.FORMS if f"--{_switch(form)}" in arguments), log.NORMAL)


def _switch(form: str) -> str:
    return "log-json" if form == log.JSON else form


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    log.warning(str(message))


def _show_in_full(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    log.verbatim(warnings.formatwarning(message, category, filename, lineno, line))
