"""Which small models are one model to a compiler: the operators that torch.export turns them into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Mapping[str, Tensor]  # images, or inputs by name
_AXES = 5  # an integer that is larger is a size


def fingerprint(model: nn.Module, inputs: Inputs) -> str:
    """A digest of operators, of what each is computed from, and of their arguments. Sizes and decimal numbers are left
    out, axes and kinds of numbers are not. Empty where torch.export gives up.
    """
    try:
        with torch.no_grad():
            exported = (torch.export.export(model, (inputs,), strict=False) if isinstance(inputs, Tensor)
                        else torch.export.export(model, (), dict(inputs), strict=False))
    except Exception:
        return ""
    places = {node: index for index, node in enumerate(exported.graph.nodes)}
    lines = [f"{node.op if node.op != 'call_function' else node.target} {_said((node.args, node.kwargs), places)} "
             f"{_kind(node.meta.get('val'))}" for node in places]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _said(argument: Any, places: Mapping[torch.fx.Node, int]) -> str:
    """An argument of an operator, with nodes by their places."""
    if isinstance(argument, torch.fx.Node):
        return f"%{places[argument]}"
    if isinstance(argument, (tuple, list)):
        return "[" + " ".join(_said(each, places) for each in argument) + "]"
    if isinstance(argument, Mapping):
        return " ".join(f"{name}={_said(each, places)}" for name, each in argument.items())
    if isinstance(argument, float) or (isinstance(argument, int) and abs(argument) > _AXES):
        return "number"
    return str(argument)


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.ndim}" if isinstance(value, Tensor) else type(value).__name__
