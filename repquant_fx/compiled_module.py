"""A module that computes by a compiled file what another module computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx.compiled import CompiledModel
from repquant_fx.errors import InputError, first_line
from repquant_fx.frontends.part import bind, find
from repquant_fx.runtime import run, session
from repquant_fx.torch_private import pytree


class Outputs(dict[str, Tensor]):
    """Tensors by name, also as attributes, as transformers gives them."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the compiled file gives {', '.join(self)}, but no {name}") from error


class CompiledModule(nn.Module):
    """Computes what a module computed, by ONNX Runtime, on the CPU and without gradients.

    It takes and gives tensors of the same shapes and float dtypes in the same structure, on the device that they came
    from. What else is asked of it, such as a configuration, the module answers that it stands for.

    Attributes:
        compiled: the model that runs; None where it was read from a file.
        original: the module that it stands for.
        inputs, outputs: names of those that the file takes, and gives.
    """

    def __init__(
        self, original: nn.Module, source: CompiledModel | str | Path, threads: int | None = None
    ) -> None:
        """
        Args:
            original: the module that it stands for.
            source: the compiled module, or its `.onnx`.
            threads: of ONNX Runtime; its default where None.

        Raises:
            InputError: the file cannot be read, or takes what the module does not.
        """
        super().__init__()
        # no submodule: its parameters are not this module's
        object.__setattr__(self, "original", original)
        self.compiled = source if isinstance(source, CompiledModel) else None
        self._session = (
            source.session(threads) if isinstance(source, CompiledModel) else session(source, threads=threads)
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._structure: Any = None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the compiled file, and what belongs beside it, into a directory; returns the file.

        Raises:
            OutputError: it cannot be written.
            InputError: the module runs from a file, which is written already.
        """
        if self.compiled is None:
            raise InputError("this module runs from a file, which is written already")
        return self.compiled.save(folder, force=True)

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
            first = next(value for value in named.values() if isinstance(value, Tensor))
            # a mask that is left out hides nothing
            tensors = {name: torch.ones_like(first) if "mask" in name and named.get(name) is None else named[name]
                       for name in self.inputs}
            found = run(self._session, {name: _plain(value) for name, value in tensors.items()})
        except Exception as error:
            shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
            raise InputError(f"the compiled module does not run on {shapes}: {first_line(error)}; compile it on inputs "
                             "of this shape") from error
        leaves, spec = self._structure or self._learn(args, kwargs)
        if sum(isinstance(leaf, Tensor) for leaf in leaves) != len(found):  # the file gives what its task asks for
            return Outputs({name: value.to(first.device) for name, value in zip(self.outputs, found, strict=True)})
        results = iter(found)
        filled = [next(results).to(first.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    def _learn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The structure of the original's result: it runs once, at the first call."""
        with torch.no_grad():
            leaves, spec = pytree.tree_flatten(self.original(*args, **kwargs))
        self._structure = [torch.empty(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        return self._structure


def run_from_file(model: nn.Module, path: str, file: str | Path, threads: int | None = None) -> None:
    """Put a module into a model, in place of the one at a path, that runs a file compiled from that one.

    Args:
        model: changed in this module alone; it is put in eval mode.
        path: of the module, such as `backbone`.
        file: what `compile(..., module=path)` wrote.
        threads: of ONNX Runtime; its default where None.

    Raises:
        InputError: there is no such module; the file cannot be read, or takes inputs of other names.
    """
    original = find(model, path, type(model).__name__)
    replacement = CompiledModule(original, file, threads).eval()
    takes = inspect.signature(original.forward).parameters
    named = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    strange = [name for name in replacement.inputs if name not in takes and not named]
    if strange:
        raise InputError(f"{file} was not compiled from {path}, a {type(original).__name__}: it takes "
                         f"{', '.join(strange)}, which that does not")
    model.eval().set_submodule(path, replacement)


def _plain(value: Any) -> Tensor:
    """As the file takes it: half and double precision become float32."""
    tensor: Tensor = value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
