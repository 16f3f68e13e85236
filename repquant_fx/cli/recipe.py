"""`repquant-fx recipe`: write and show recipes, and print their schema."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from repquant_fx.cli.common import Parser, add_output
from repquant_fx.cli.method import number_or_word


def add(command: argparse.ArgumentParser) -> None:
    """The subcommands of `recipe`."""
    from repquant_fx.recipe import PRESETS
    from repquant_fx.recipe_text import FORMATS

    def sub(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        each = actions.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        each.set_defaults(run=function)
        add_output(each)
        return each  # type: ignore[no-any-return]

    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION", parser_class=Parser)
    init = sub("init", run_init, "print a commented recipe to start from, or write it to --out")
    init.add_argument(
        "--preset", choices=tuple(PRESETS), default="repquant", help="a published method (default repquant)"
    )
    init.add_argument("--wbits", type=int, default=8, help="bits of weights (default 8)")
    init.add_argument("--abits", type=number_or_word, default=8, metavar="N or none",
                      help="bits of activations, none to leave them in float (default 8)")
    show = sub(
        "show", run_show, "print the effective recipe of an exported file, or of a recipe with its defaults filled in"
    )
    show.add_argument("file", type=Path, help="an exported .onnx, or a .yaml, .yml or .toml recipe")
    for each in (init, show):
        each.add_argument("--format", choices=FORMATS, help="default yaml, or what the name of --out says")
        each.add_argument("--out", type=Path, help="the file to write instead of stdout")
        each.add_argument("--force", action="store_true", help="replace an existing file")
    sub("schema", run_schema, "print the JSON schema of recipes")


def run_init(options: argparse.Namespace) -> int:
    """A commented recipe of a preset; returns the exit code."""
    from repquant_fx.recipe import PRESETS

    preset: Any = PRESETS[options.preset]
    return _give(preset(wbits=options.wbits, abits=options.abits), options)


def run_show(options: argparse.Namespace) -> int:
    """The recipe in a file; returns the exit code."""
    from repquant_fx.recipe import Recipe

    return _give(Recipe.from_file(options.file), options)


def run_schema(options: argparse.Namespace) -> int:
    """The schema; returns the exit code."""
    from repquant_fx.recipe_text import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _give(recipe: Any, options: argparse.Namespace) -> int:
    from repquant_fx.errors import InputError
    from repquant_fx.files import check_writable, write_atomically
    from repquant_fx.recipe_text import write

    if options.json:
        print(json.dumps(recipe.to_dict()))
        return 0
    named = (
        {".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(options.out.suffix.lower())
        if options.out is not None
        else None
    )
    if options.out is not None and named is None:
        raise InputError(f"a recipe is .yaml, .yml or .toml; found {options.out}")
    if options.format is not None and named not in (None, options.format):
        raise InputError(f"--format {options.format}, but {options.out} is named like {named}")
    text = write(recipe, options.format or named or "yaml")
    if options.out is None:
        print(text, end="")
        return 0
    write_atomically(check_writable(options.out, options.force), text.encode())
    return 0
