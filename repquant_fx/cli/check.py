"""`repquant-fx check`: does a runtime compute what an exported file says?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repquant_fx.cli.common import MOST_SAMPLES, add_output, count, seconds, seed
from repquant_fx.security.channel import LOAD_SECONDS
from repquant_fx.targets import RUNTIMES


def add(command: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    command.set_defaults(run=run, allow_pickle=False)
    command.add_argument("model", type=Path, help="an ONNX file with Q/DQ, or a directory that compile wrote")
    command.add_argument("--runtime", choices=tuple(RUNTIMES), help="default: that of the target in the file")
    command.add_argument("--data", help="image folder or .npy/.npz/.pt/.safetensors tensors (default: made up)")
    command.add_argument("--samples", type=count(MOST_SAMPLES), default=4, help="at most so many (default 4)")
    command.add_argument("--seed", type=seed, default=0, help="chooses samples (default 0)")
    command.add_argument("--load-timeout", type=seconds, metavar="SECONDS", default=LOAD_SECONDS,
                         help=f"that it may take (default {LOAD_SECONDS:g})")
    add_output(command)


def run(options: argparse.Namespace) -> int:
    """Check and print; returns the exit code, 3 where the runtime computes something else."""
    from repquant_fx import log
    from repquant_fx.errors import ParityError
    from repquant_fx.file_check import check_file
    from repquant_fx.files import MODEL
    from repquant_fx.report import checked, finite, free_running

    log.stage("check")
    path = options.model / MODEL if (options.model / MODEL).is_file() else options.model
    found = check_file(path, options.runtime, options.data, samples=options.samples, seed=options.seed)
    log.finish()
    parity = finite(found.parity.to_dict())
    result = {"model": str(path), "target": found.target, "version": found.version, "inputs": found.inputs,
              "parity": parity}
    log.result({key: value for key, value in result.items() if key != "parity"})
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{path}, for {found.target}, on {found.inputs}\n{checked(parity)}\n{free_running(parity)}")
    try:
        found.parity.raise_on_problems()
    except ParityError as error:
        log.error(f"error: {error}", type(error).__name__, error.exit_code)
        return error.exit_code
    return 0
