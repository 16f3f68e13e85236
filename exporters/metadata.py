"""What the file says about itself: keys of an exported model's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from repquant_fx.recipe import Recipe
from repquant_fx.version import VERSION

PREFIX = "repquant_fx."


def describe(recipe: Recipe, preprocessing: Mapping[str, Any] | None, layers: str | None = None) -> dict[str, str]:
    """`repquant_fx.version`, `.method`, `.bits`, `.recipe` (JSON), and where known `.preprocessing` (JSON) and `.layers` (`inspection.record`)."""
    parts = [recipe.norm + " norms", recipe.softmax + " softmax", f"{recipe.clipping} clipping" if recipe.clipping != "none" else "no clipping",
             "GPTQ" if recipe.gptq else "round to nearest"]
    entries = {
        "version": VERSION,
        "method": "RepQuant (arXiv 2402.05628): " + ", ".join(parts),
        "bits": f"W{recipe.wbits}A{recipe.abits}" + (" with per-layer overrides" if recipe.layers else ""),
        "recipe": json.dumps(recipe.to_dict(), sort_keys=True),
    }
    if preprocessing is not None:
        entries["preprocessing"] = json.dumps(dict(preprocessing), sort_keys=True)
    if layers is not None:
        entries["layers"] = layers
    return {PREFIX + key: value for key, value in entries.items()}
