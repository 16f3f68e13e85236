"""Options that make a recipe: a file or a preset, and a switch for every setting on top."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from repquant_fx.errors import RecipeError


def add_method(command: argparse.ArgumentParser) -> None:
    """The options of the method."""
    from repquant_fx.recipe import CHOICES, PRESETS

    method = command.add_argument_group("quantization (overrides the recipe)")
    method.add_argument("--recipe", type=Path, help="YAML or TOML file, or an exported .onnx to take its recipe")
    method.add_argument("--preset", choices=tuple(PRESETS), help="start from a published method (default repquant)")
    method.add_argument("--wbits", type=int, help="bits of weights, 2 to 8 (default 8)")
    method.add_argument("--abits", type=int, help="bits of activations, 2 to 8 (default 8)")
    method.add_argument("--input-bits", type=int, help="bits of the model's input (default 8)")

    words = {"norm": "scales of norm activations", "softmax": "grid of softmax activations", "softmax_scale": "how its scale is chosen",
             "clipping": "per-channel dual clipping of norm activations", "activations": "range of all other activations",
             "weights": "range of weights"}
    for name, choices in CHOICES.items():
        method.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=f"{words[name]} (default {choices[0]})")
    method.add_argument("--percentile", type=float, help="for --activations percentile (default 99.99)")
    method.add_argument("--correction", action=argparse.BooleanOptionalAction, default=None,
                        help="least-squares correction towards the float model's outputs (default on)")
    method.add_argument("--absorb", type=_kinds, metavar="KIND,...", help="where else channel scales move into constants: values, query_key, "
                        "linear, or none (default: values,linear)")
    method.add_argument("--gptq", action=argparse.BooleanOptionalAction, default=None, help="error-compensating weight rounding (default on)")
    method.add_argument("--gptq-damping", type=float, help="share of the mean diagonal added to the Hessian (default 0.01)")
    method.add_argument("--gptq-block", type=int, help="columns updated at once (default 128)")
    method.add_argument("--gptq-activation-order", action=argparse.BooleanOptionalAction, default=None,
                        help="sweep columns by decreasing input energy (default on)")


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


def _kinds(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))
