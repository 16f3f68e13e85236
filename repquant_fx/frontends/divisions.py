"""Divisions of integers that end the process: by -1, which the least integer does not survive, and by zero.

The processor raises a signal where a kernel of torch or of ONNX Runtime divides the least int64 (or int32) by -1; a
quotient that does not fit has no value. So the divisor must be known before a program from a file runs:

| divisor | |
|---|---|
| a number | neither 0 nor -1 |
| a size, or sums, products and quotients of sizes | cannot be -1; torch itself refuses zero |
| a tensor of the file that no node writes into | holds neither 0 nor -1 |
| anything else | refused |
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.torch_private import OpOverload, schema

aten = torch.ops.aten
_DIVISIONS = frozenset(("div", "divide", "floor_divide", "remainder", "fmod"))
_ROUNDED = frozenset(("div", "divide"))  # of integers only with a rounding mode, else true division
_RISKY = frozenset((0, -1))
_SIZES = (aten.sym_size.int, aten.sym_numel.default)
_OF_SIZES = (operator.add, operator.mul, operator.floordiv)
_SAME_VALUES = frozenset(
    "alias clone contiguous detach detach_ expand expand_as flatten lift_fresh lift_fresh_copy permute reshape select "
    "slice squeeze t transpose unsqueeze view".split()
)


def is_division_of_integers(target: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call divides integers, or sizes, by others.

    Args:
        target: of the node.
        args, kwargs: values, fake or real.
    """
    if target in (operator.floordiv, operator.mod):
        return True
    name = _name(target)
    if name not in _DIVISIONS or (name in _ROUNDED and kwargs.get("rounding_mode") is None):
        return False
    return not any(
        isinstance(value, (float, torch.SymFloat, complex))
        or (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))
        for value in (*args[:2], kwargs.get("self"), kwargs.get("other"))
    )


def risky_values(tensor: Tensor) -> frozenset[int]:
    """Which of 0 and -1 a tensor of the file holds, unless its numbers are no integers."""
    if tensor.is_floating_point() or tensor.is_complex():
        return frozenset()
    return frozenset(value for value in _RISKY if bool((tensor == value).any()))


def check_divisor(node: Node, stored: Mapping[Node, frozenset[int]]) -> None:
    """Refuse a division of integers whose divisor may be -1 or zero.

    Args:
        node: calls a division of integers.
        stored: of the tensors of the file the `risky_values`, by the placeholders that stand for them.

    Raises:
        ValueError: it may be; the message goes after the name of the node.
    """
    divisor = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    if isinstance(divisor, Node):
        if _is_size(divisor):
            return
        known = _stored_behind(divisor, stored)
        if known is None:
            raise ValueError("it divides integers by what is only computed; divide by a number, or as float")
        if _writes(node):
            raise ValueError("it divides integers by a tensor, and other nodes write into tensors; divide by a number")
    else:
        known = frozenset((int(divisor),)) if isinstance(divisor, int) else frozenset()
    if wrong := known & _RISKY:
        raise ValueError(f"it divides integers by {min(wrong)}, which can end the process")


def _name(target: object) -> str:
    """Of an aten operator without the `_` of one that works in place."""
    return schema(target).name.removeprefix("aten::").rstrip("_") if isinstance(target, OpOverload) else ""


def _is_size(node: Node) -> bool:
    """Whether a number is a size, or what cannot be negative of sizes."""
    return node.target in _SIZES or (
        node.target in _OF_SIZES
        and all(_is_size(arg) if isinstance(arg, Node) else isinstance(arg, int) and arg >= 0 for arg in node.args)
    )


def _stored_behind(node: Node, stored: Mapping[Node, frozenset[int]]) -> frozenset[int] | None:
    """Of the tensor of the file whose values, all or some of them, a node has; None where it has others."""
    while node not in stored:
        source = node.args[0] if node.args else None
        if _name(node.target) not in _SAME_VALUES or not isinstance(source, Node):
            return None
        if node.target is aten.view.dtype:
            return None  # the same bytes read as another type
        node = source
    return stored[node]


def _writes(node: Node) -> bool:
    """Whether any node of the graph, or of a graph inside it, writes into a tensor."""
    whole = node.graph.owning_module
    return whole is None or any(
        argument.alias_info is not None and argument.alias_info.is_write
        for part in whole.modules()
        if isinstance(part, GraphModule)
        for other in part.graph.nodes
        if isinstance(other.target, OpOverload) and other.target is not aten.detach_.default
        for argument in schema(other.target).arguments
    )
