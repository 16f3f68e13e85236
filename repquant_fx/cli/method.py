"""Options that make a recipe: a file or a preset, and a switch for every setting on top."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from repquant_fx.errors import RecipeError
from repquant_fx.recipe_settings import Setting, settings_of


def add_method(command: argparse.ArgumentParser) -> None:
    """The options of the method."""
    from repquant_fx.recipe import PRESETS, Recipe
    from repquant_fx.recipe_text import descriptions

    method = command.add_argument_group("quantization (overrides the recipe)")
    method.add_argument("--recipe", type=Path, help="YAML or TOML file, or an exported .onnx to take its recipe")
    method.add_argument("--preset", choices=tuple(PRESETS), help="start from a published method (default repquant)")
    words = descriptions(Recipe)
    for name, limits in settings_of(Recipe).items():
        default = getattr(Recipe(), name)
        said = _said(default)
        allowed = "" if limits.kind is str else f" {limits.allowed()}"  # argparse shows choices itself
        text = f"{words.get(name, '')}{allowed}".replace("`", "").replace("%", "%%").strip()
        method.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (default {said})", **_form(limits))


def _said(default: Any) -> str:
    """A default in words."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) or "none" if isinstance(default, tuple) else str(default)


def _form(limits: Setting) -> dict[str, Any]:
    """How argparse reads a setting. Numbers are checked with the whole recipe."""
    if limits.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if limits.kind is tuple:
        return {"type": _kinds, "metavar": "KIND,... or none"}
    if limits.alone is not None:
        return {"type": limits.kind, "nargs": "?", "const": limits.alone, "metavar": "STEPS"}
    if limits.words:
        return {"type": number_or_word, "metavar": f"N or {limits.words[0][0]}"}
    return {"choices": limits.choices} if limits.kind is str else {"type": limits.kind}


def recipe_from(options: argparse.Namespace) -> Any:
    """The recipe file or preset, with the switches given on the command line on top.

    Raises:
        RecipeError: invalid values, or both a recipe and a preset.
    """
    from dataclasses import fields, replace

    from repquant_fx.recipe import PRESETS, Recipe

    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if getattr(options, f.name, None) is not None}
    if options.recipe is not None:
        if options.preset is not None:
            raise RecipeError("give --recipe or --preset, not both")
        return replace(Recipe.from_file(options.recipe), **given)
    bits = {name: given.pop(name, 8) for name in ("wbits", "abits")}
    preset: Any = PRESETS[options.preset or "repquant"]
    return preset(**bits, **given)


def number_or_word(text: str) -> int | str:
    """A word is checked with the whole recipe, as numbers are."""
    return int(text) if text.strip().lstrip("-").isdecimal() else text


def _kinds(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))
