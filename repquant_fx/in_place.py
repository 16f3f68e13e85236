"""A module of a model compiled and put back in its place: what is around it stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx import compiler
from repquant_fx.compiled import CompiledModel
from repquant_fx.errors import InputError, first_line
from repquant_fx.frontends.part import bind, find
from repquant_fx.recipe import RecipeLike
from repquant_fx.runtime import run
from repquant_fx.torch_private import pytree


class CompiledModule(nn.Module):
    """Computes what a module computed, by ONNX Runtime, on the CPU and without gradients.

    It takes and gives tensors of the same shapes and float dtypes in the same structure, on the device that they came
    from. What else is asked of it, such as a configuration, the module answers that it stands for.

    Attributes:
        compiled: the model that runs.
        original: the module that it stands for.
    """

    def __init__(self, original: nn.Module, compiled: CompiledModel, threads: int | None = None) -> None:
        super().__init__()
        # no submodule: its parameters are not this module's
        object.__setattr__(self, "original", original)
        self.compiled, self._session = compiled, compiled.session(threads)
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._structure: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:  # it is being made
                raise
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original gives.

        Raises:
            InputError: shapes other than those that the file takes.
        """
        named = bind(self.original, args, kwargs)
        try:
            tensors = {name: named[name] for name in self._inputs}
            first = next(iter(tensors.values()))
            found = run(self._session, {name: _plain(value) for name, value in tensors.items()})
        except Exception as error:
            shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
            raise InputError(f"the compiled module does not run on {shapes}: {first_line(error)}; compile it on inputs "
                             "of this shape") from error
        leaves, spec = self._structure or self._learn(args, kwargs)
        results = iter(found)
        filled = [next(results).to(first.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    def _learn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The structure of the original's result: it runs once, at the first call."""
        with torch.no_grad():
            leaves, spec = pytree.tree_flatten(self.original(*args, **kwargs))
        self._structure = [torch.empty(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        return self._structure


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


def _plain(value: Any) -> Tensor:
    """As the file takes it: half and double precision become float32."""
    tensor: Tensor = value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
