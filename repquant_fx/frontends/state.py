"""The state of a module that came out of a file, judged by what its class itself puts there.

A pickle gives an instance any `__dict__`. The classes are known, but their code means what it says only with attributes
of the kind that their constructors make: children that are modules, parameters that are tensors, and plain data that
hides no method. Nothing else can be called: what a file may hold of functions are activations, and classes that refuse.
"""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from repquant_fx import limits
from repquant_fx.errors import ModelFileError
from repquant_fx.frontends import members
from repquant_fx.frontends.members import MAPPING, MODULE, NUMBER, OTHER, STRING, TENSOR, members_of
from repquant_fx.security.escape import printable
from repquant_fx.torch_private import BUFFERS, FLAGS, MODULES, PARAMETERS, SLOTS, native_functions

_DEEPEST = 64  # levels of lists in lists
_MOST_ITEMS = 200_000  # of the plain data of one module, counted once for each way to them
_MOST_BITS = 64
_SMALL_BYTES = 16 << 20  # up to here a tensor may claim more than its storage holds
_ADVICE = "Pass --allow-pickle if you trust the file"


class Unfit(Exception):
    """What is wrong with a value."""


def check_state(module: nn.Module, where: str, inert: tuple[type, ...] = ()) -> None:
    """Refuse a module whose own state is not of the kind that its class makes. Its children are another call's.

    Args:
        module: read from a file; nothing of it is run.
        where: the file and the path of the module, for the message.
        inert: classes of things that are held and refuse to be called.

    Raises:
        ModelFileError: it is not; the message names the attribute.
    """
    state = vars(module)
    cls: type = type(module)
    known = members_of(cls)
    _check_own(state, cls, where)
    children: dict[str, Any] = {}
    for slot, kind in ((PARAMETERS, Tensor), (BUFFERS, Tensor), (MODULES, nn.Module)):
        for name, value in state[slot].items():
            if value is not None and not isinstance(value, kind):
                _refuse(
                    where,
                    name,
                    f"is {_a(value)} where {cls.__name__} holds {_A[MODULE if slot == MODULES else TENSOR]}",
                )
            if name in state or name in children:
                _refuse(where, name, "is there twice")
            children[name] = value
    plain = {name: value for name, value in state.items() if name not in _own_attributes() and name not in FLAGS}
    count = [0]
    for name, value in plain.items():
        _check_shadow(cls, name, value, where)
    for name, value in {**children, **plain}.items():
        try:
            found = _kinds_of(value, count, inert)
            _check_lookup(cls, value, known.looks_up)
        except Unfit as error:
            _refuse(where, name, str(error))
        wanted = known.kinds.get(name, frozenset())
        if name in plain and MODULE in found:
            _refuse(where, name, "is a module among plain data")
        if (
            wanted
            and OTHER not in wanted
            and not found <= wanted | ({NUMBER} if wanted & {STRING, MAPPING} else set())
        ):
            _refuse(
                where,
                name,
                f"is {_a(value)} where {cls.__name__} holds {' or '.join(_A[kind] for kind in sorted(wanted))}",
            )


def check_tensors(tensors: list[tuple[str, Tensor]], where: str) -> None:
    """Refuse tensors that claim more than their storage holds, or together more than this machine has.

    Raises:
        ModelFileError: one does.
        InputError: they are too large.
    """
    total = 0
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in tensors}.values():
        claimed = tensor.numel() * tensor.element_size()
        total += claimed
        try:
            held = tensor.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError) as error:
            raise ModelFileError(
                f"{where} holds a tensor that is not plain: {_shown(name)} is {tensor.layout}"
            ) from error
        if claimed > max(held, _SMALL_BYTES):
            raise ModelFileError(
                f"{where}: {_shown(name)} claims {limits.readable(claimed)} ({list(tensor.shape)}) and holds "
                f"{limits.readable(held)}; save it contiguous"
            )
    limits.check_size((total,), f"{where}: all tensors together", itemsize=1)


_A = {
    NUMBER: "a number",
    STRING: "a str",
    MAPPING: "a dict",
    TENSOR: "a Parameter or buffer",
    MODULE: "a module",
    members.OBJECT: "an object of its own",
    OTHER: "something else",
}


def _check_own(state: dict[str, Any], cls: type, where: str) -> None:
    """What torch itself sets in every module: containers of the right type, and no hooks."""
    for name, made in _own_attributes().items():
        value = state.get(name, made)
        if isinstance(made, dict):
            if (
                not isinstance(value, dict)
                or getattr(value, "__dict__", None)  # one of an ordered dict can hide its methods
                or (not all(isinstance(key, str) for key in value) and not name.endswith("hooks"))
            ):
                _refuse(where, name, f"is {_a(value)} where every module holds a dict")
            if value and name not in SLOTS:
                raise ModelFileError(
                    f"{where} carries hooks ({name}); hooks are code. Remove them before saving, or pass "
                    "--allow-pickle if you trust the file"
                )
        elif not isinstance(value, type(made)) and not (made is None and isinstance(value, bool)):
            _refuse(where, name, f"is {_a(value)}")
    for name, kind in FLAGS.items():
        if name in state and not isinstance(state[name], kind):
            _refuse(where, name, f"is {_a(state[name])}")
    if missing := [slot for slot in SLOTS if slot not in state]:
        raise ModelFileError(f"{where} is not whole: {cls.__name__} without {missing[0]}")


@functools.cache
def _own_attributes() -> dict[str, Any]:
    return dict(vars(nn.Module()))


def _check_shadow(cls: type, name: object, value: object, where: str) -> None:
    """An attribute of an instance hides one of its class. It may do so with plain data in the place of plain data."""
    if not isinstance(name, str) or name.startswith("__"):
        _refuse(where, name, "is no name of an attribute")
    hidden = inspect.getattr_static(cls, name, None)
    if hidden is None or value is hidden:
        return
    if (
        type(value) is not type(hidden) and not (isinstance(value, (int, float)) and isinstance(hidden, (int, float)))
    ) or callable(hidden):
        _refuse(where, name, f"is {_a(value)} that hides the one of {cls.__name__}")


def _check_lookup(cls: type, value: object, looks_up: bool) -> None:
    """A class that fetches its attributes by name may be given the names of its children, and not of its methods."""
    if looks_up:
        for text in _strings(value):
            if callable(inspect.getattr_static(cls, text, None)) or text.startswith("__"):
                raise Unfit(f"names {text}, a method of {cls.__name__}, which looks up its attributes by name")


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return (
        [text for item in value for text in _strings(item)] if isinstance(value, (list, tuple, set, frozenset)) else []
    )


def _kinds_of(value: object, count: list[int], inert: tuple[type, ...], depth: int = 0) -> set[str]:
    """Kinds of a value and of what is in it.

    Raises:
        Unfit: it is neither plain data nor a tensor nor a module, or it does not end.
    """
    count[0] += 1
    if depth > _DEEPEST or count[0] > _MOST_ITEMS:
        raise Unfit(f"nests more than {_DEEPEST} levels or {_MOST_ITEMS} items of plain data")
    if value is None:
        return set()
    if isinstance(value, enum.Enum):
        return {OTHER}
    if isinstance(value, (bool, int, float, complex)):
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise Unfit(f"is an integer of {value.bit_length()} bits")
        return {NUMBER}
    if isinstance(value, str):
        return {STRING}
    if isinstance(value, range):
        if value[_MOST_ITEMS:]:
            raise Unfit("is a range beyond measure")
        return {OTHER}
    if isinstance(value, (list, tuple, set, frozenset)) and not getattr(value, "__dict__", None):
        return set().union(*(_kinds_of(item, count, inert, depth + 1) for item in value))
    if isinstance(value, dict) and not getattr(value, "__dict__", None):
        for pair in value.items():
            for item in pair:
                _kinds_of(item, count, inert, depth + 1)
        return {MAPPING}
    if type(value) in (Tensor, nn.Parameter):
        vars(value).clear()  # an attribute of a tensor can hide its methods; no layer needs one
        return {TENSOR}
    if isinstance(value, nn.Module):
        if depth:
            raise Unfit(f"holds {_a(value)} among plain data")
        return {MODULE}
    if isinstance(
        value,
        (
            bytes,
            bytearray,
            slice,
            weakref.ReferenceType,
            torch.dtype,
            torch.device,
            torch.layout,
            torch.memory_format,
            *inert,
        ),
    ) or _is_activation(value):
        return {OTHER}
    raise Unfit(f"is {_a(value)}, which is neither plain data nor a tensor nor a layer")


@functools.cache
def activation_functions() -> dict[str, Callable[..., Any]]:
    """The functions that a file may name, by their names: of a tensor, giving a tensor."""
    names = (
        "celu",
        "elu",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "log_softmax",
        "logsigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softmax",
        "softplus",
        "softsign",
        "tanh",
    )
    spaces = {module.__name__: module for module in (nn.functional, native_functions())}
    return {
        f"{space}.{name}": getattr(module, name)
        for space, module in spaces.items()
        for name in names
        if hasattr(module, name)
    }


def _is_activation(value: object) -> bool:
    return any(value is function for function in activation_functions().values())


def _a(value: object) -> str:
    name = value.__qualname__ if isinstance(value, type) else type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _refuse(where: str, name: object, problem: str) -> NoReturn:
    raise ModelFileError(
        f"{where}: `{_shown(name)}` {problem}. {_ADVICE}, or save a state dict (or safetensors) and pass --arch"
    )


def _shown(name: object) -> str:
    return printable(name)[:200] if isinstance(name, str) else ascii(name)[:200]
