"""A module of a model compiled and put back in its place: what is around it stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from repquant_fx import compiler
from repquant_fx.compiled import CompiledModel
from repquant_fx.compiled_module import CompiledModule
from repquant_fx.frontends.part import find
from repquant_fx.recipe import RecipeLike


def compile_in_place(
    model: nn.Module,
    module: str,
    calibration: Any = None,
    recipe: RecipeLike | None = None,
    *,
    threads: int | None = None,
    **options: Any,
) -> CompiledModel:
    """Compile one module of a model, and put one in its place that runs the compiled file.

    Args:
        model: changed in this module alone; it is put in eval mode.
        module: its path, such as `backbone`.
        calibration: data for the whole model.
        recipe, options: see `compile`; `example_inputs` are those of the whole model.
        threads: of ONNX Runtime; its default where None.

    Returns:
        what `compile` gives. `model.get_submodule(module).original` is the module that was there.

    Raises:
        InputError, ParityError: as `compile` does; nothing has changed then.
    """
    original = find(model, module, type(model).__name__)
    compiled = compiler.compile(model, calibration, recipe, module=module, **options)
    replacement = CompiledModule(original, compiled, threads).eval()
    model.eval().set_submodule(module, replacement)
    return compiled
