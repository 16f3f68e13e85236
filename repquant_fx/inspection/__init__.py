"""What was done to a model, read from its file alone; or what would be done to one that is not compiled yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repquant_fx.errors import InputError
from repquant_fx.files import DECODER, ENCODER, MODEL
from repquant_fx.inspection.file import inspect_file, is_file
from repquant_fx.inspection.preview import inspect_model
from repquant_fx.inspection.table import Inspection, Row

__all__ = ["Inspection", "Row", "inspect", "inspect_file", "inspect_model"]


def inspect(source: str, recipe: Any = None, **options: Any) -> Inspection:
    """`inspect_file` of a `.onnx` or of the one in a directory that `compile` wrote, `inspect_model` of anything else.

    Raises:
        InputError: it cannot be read, or a recipe was given for a file that has its own.
    """
    if (Path(source) / MODEL).is_file():
        source = str(Path(source) / MODEL)
    if (Path(source) / ENCODER).is_file():
        raise InputError(f"{source} holds an encoder and a decoder, which are inspected one by one: give "
                         f"{Path(source) / ENCODER} or {DECODER}")
    if not is_file(source):
        return inspect_model(source, recipe, **options)
    from repquant_fx.recipe import Recipe

    if recipe not in (None, Recipe()):
        raise InputError(f"{source} is compiled and holds its recipe; a recipe and its switches are for models "
                         "that are not compiled yet")
    return inspect_file(source)
