"""Models that are already in memory: the Python API's counterpart of `loading`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from repquant_fx.device import without_autocast
from repquant_fx.errors import InputError
from repquant_fx.frontends import architectures
from repquant_fx.frontends.loading import LoadedModel, check_finite, ready
from repquant_fx.frontends.signature import free_axes, is_transformers, stateless

P = ParamSpec("P")
R = TypeVar("R")


def left_as_found(function: Callable[P, R]) -> Callable[P, R]:
    """Give a function's first argument, where it is a module, its train and eval modes back, and torch its random
    state.

    It runs outside any autocast. So that a training script can call it between two steps.
    """
    @functools.wraps(function)
    def careful(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices), without_autocast():
                return function(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
    return careful

OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


def from_memory(
    model: nn.Module | torch.export.ExportedProgram,
    *,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    input_shape: Sequence[int] | None = None,
    task: str | None = None,
) -> LoadedModel:
    """Wrap a module or an exported program.

    Args:
        model: not mutated, but a module is put in eval mode. One on another device or in half or double precision is
            copied to float32 on the CPU; of a compiled or parallel one (`torch.compile`, DataParallel) the module
            inside is taken.
        example_inputs: positional, or by name. A module's may be left out where its configuration tells them; a program
            has its own.
        input_shape, task: see `loading.load_model`.

    Raises:
        InputError: neither a module nor a program; no example inputs and no way to tell them.
        ModelFileError: weights that are not finite.
    """
    if isinstance(model, torch.export.ExportedProgram):
        inputs = tuple(_values(example_inputs)) if example_inputs is not None else _stored(model)
        check_finite([(n, t) for n, t in model.state_dict.items() if isinstance(t, nn.Parameter)],
                     [(n, t) for n, t in model.state_dict.items() if not isinstance(t, nn.Parameter)], "the program")
        return LoadedModel(None, model, inputs, True, None, "an exported program in memory", task=task)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a model is a torch.nn.Module, an ExportedProgram, a file or timm:NAME; found {type(model).__name__}"
        )
    model = _plain(model)
    name = type(model).__name__
    check_finite(model.named_parameters(), model.named_buffers(), name)
    model.eval()
    source = f"{name} in memory"
    if example_inputs is None:
        return ready(model, source, input_shape, task)
    named = tuple(example_inputs) if isinstance(example_inputs, Mapping) else None
    axes = tuple(free_axes(name) for name in named) if named is not None else None
    return LoadedModel(
        stateless(model) if is_transformers(model) else model,
        None,
        tuple(_plain_input(t) for t in _values(example_inputs)),
        False,
        architectures.preprocessing(model),
        source,
        input_names=named,
        dynamic_axes=axes,
        task=task,
    )


def _plain(model: nn.Module) -> nn.Module:
    """The module inside wrappers of torch, in float32 on the CPU; itself where it is that."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.device.type == "cpu" and t.dtype not in OTHER_FLOATS for t in tensors):
        return model
    return copy.deepcopy(model).to("cpu").float()


def _values(inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> Sequence[Tensor]:
    return list(inputs.values()) if isinstance(inputs, Mapping) else inputs


def _plain_input(value: Tensor) -> Tensor:
    value = value.detach().to("cpu")
    return value.float() if value.dtype in OTHER_FLOATS else value


def _stored(program: torch.export.ExportedProgram) -> tuple[Tensor, ...]:
    if program.example_inputs is None:
        raise InputError("the exported program holds no example inputs; pass example_inputs")
    args, kwargs = program.example_inputs
    inputs = (*args, *kwargs.values())
    if not all(isinstance(value, Tensor) for value in inputs):
        raise InputError(
            "the exported program takes inputs that are not tensors; export a module whose forward takes tensors only"
        )
    return inputs
