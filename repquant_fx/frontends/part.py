"""A part of a model as a model of its own: what reaches a module while the whole runs.

For models of which a part can be captured but not the whole: a detector's backbone, before boxes whose number depends
on the image.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repquant_fx.errors import InputError, first_line

if TYPE_CHECKING:
    from repquant_fx.frontends.loading import LoadedModel

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Part:
    """Where a part comes from.

    Attributes:
        whole: the model that it is a part of.
        path: of the module in it.
    """

    whole: LoadedModel
    path: str

    def inputs(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What reaches the part, in the order of its inputs, when the whole is given a batch.

        Raises:
            InputError: the whole does not run on it or never calls the part, or something that is no tensor reaches it.
        """
        return tuple(self._arguments(batch)[0].values())

    def needed(self) -> list[int]:
        """Which inputs of the whole change what reaches the part: those of which other rows give it something else.

        Raises:
            InputError: as `inputs` does.
        """
        examples = self.whole.example_inputs
        before, found = self.inputs(examples), list[int]()
        for index, example in enumerate(examples):
            rolled = example.roll(1, 0)
            after = before if torch.equal(rolled, example) else self.inputs(
                (*examples[:index], rolled, *examples[index + 1:]))
            if torch.equal(rolled, example) or not all(map(torch.equal, before, after)):
                found.append(index)
        return found

    def completed(self, batch: Sequence[Tensor], needed: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch for the whole of the inputs that are needed; the others are the first row of the example."""
        given = dict(zip(needed, batch, strict=True))
        return tuple(given[i] if i in given else example[:1].expand(len(batch[0]), *example.shape[1:])
                     for i, example in enumerate(self.whole.example_inputs))

    def _arguments(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values by name; those that are the default are left out."""
        module, names = self.whole.module, self.whole.input_names
        assert module is not None
        part = find(module, self.path, self.whole.source)

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args, kwargs)

        hook = part.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), self.whole.guard:
                module(**dict(zip(names, batch, strict=True))) if names is not None else module(*batch)
        except _Reached as reached:
            return _by_name(part, *reached.given, self.path)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.whole.source} does not run as far as {self.path}: {first_line(error)}") from error
        finally:
            hook.remove()
        raise InputError(f"{self.whole.source} never calls its module {self.path}; name one that it runs through")


def part_of(whole: LoadedModel, path: str) -> LoadedModel:
    """A module of a loaded model, with the inputs that reach it when the whole runs on its example inputs.

    Raises:
        InputError: the model is a program, has no such module or never calls it, or it takes what is no tensor.
    """
    if whole.module is None:
        raise InputError(f"--module {path}: {whole.source} is a program, in which modules are no parts any more; "
                         "export the module by itself")
    part = Part(whole, path)
    inputs, constants = part._arguments(whole.example_inputs)
    module = find(whole.module, path, whole.source)
    if constants:
        module = copy.copy(module)
        module.forward = functools.partial(module.forward, **constants)
    prefix = f"{path}."
    return replace(
        whole,
        module=module,
        example_inputs=tuple(inputs.values()),
        preprocessing=None,
        source=f"{path} of {whole.source}",
        input_names=tuple(inputs),
        dynamic_axes=None,
        outputs=None,
        tokenizer=None,
        task=None,
        float_modules=tuple(glob.removeprefix(prefix) for glob in whole.float_modules if glob.startswith(prefix)),
        directory=None,
        part=part,
    )


def find(model: nn.Module, path: str, source: str) -> nn.Module:
    """The module at a path.

    Raises:
        InputError: there is none; names those that are called alike, or the first ones.
    """
    modules = dict(model.named_modules())
    if path in modules and path:
        return modules[path]
    names = [name for name in modules if name]
    close = difflib.get_close_matches(path, names, n=3) or [name for name, _ in model.named_children()]
    raise InputError(f"--module {path[:200]}: {source} has no such module" +
                     (f"; it has {', '.join(close[:8])}" if close else ""))


def proposal(model: object) -> str:
    """What may be captured by itself where a whole cannot be: a sentence that names its largest module; '' of a model
    without modules.
    """
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()} \
        if isinstance(model, nn.Module) else {}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    if not largest or not sizes[largest]:
        return ""
    share = 100 * sizes[largest] / sum(sizes.values())
    return (f". A part can be compiled by itself: --module {largest} has {share:.0f} % of the parameters (in Python "
            f"module={largest!r}, or repquant_fx.compile_in_place)")


def bind(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module was called with, by the names of its parameters.

    Raises:
        TypeError: it cannot be called like this.
    """
    signature = inspect.signature(module.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        named.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


class _Reached(Exception):
    """The part was called; what follows it need not run."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given = args, kwargs


def _by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    defaults = {name: p.default for name, p in inspect.signature(module.forward).parameters.items()}
    named = {name: value for name, value in bind(module, args, kwargs).items()
             if isinstance(value, Tensor) or value is not defaults.get(name)}
    for name, value in named.items():
        if not isinstance(value, (Tensor, *_PLAIN)):
            raise InputError(f"{path} takes {name}, a {type(value).__name__}; a part takes tensors only: name a module "
                             "inside it or around it")
    tensors = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"no tensor reaches {path}; name another module")
    return tensors, {name: value for name, value in named.items() if name not in tensors}
