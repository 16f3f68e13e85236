"""`repquant-fx targets`: list the targets that a file can be written for."""

from __future__ import annotations

import argparse
import json

from repquant_fx.cli.common import add_output
from repquant_fx.targets import DEFAULT, TARGETS


def add(command: argparse.ArgumentParser) -> None:
    """The options of `targets`."""
    command.set_defaults(run=run)
    add_output(command)


def run(options: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    if options.json:
        print(json.dumps([{**target.to_dict(), "default": name == DEFAULT} for name, target in TARGETS.items()]))
        return 0
    for name, target in TARGETS.items():
        print(f"{name}: {target.about}{' (default)' if name == DEFAULT else ''}\n    {target.describe()}")
    return 0
