"""Recognise root-mean-square norms that a model writes out: `x * rsqrt(mean(x^2) + eps) * weight` becomes one operator.

In any order of the factors, with `rsqrt`, a division by `sqrt` or a power, with or without a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, aten, copy_meta, is_constant, is_tensor, shape_of
from repquant_fx.passes.channel_flow import is_empty
from repquant_fx.passes.spec import CANONICAL


class FuseRMSNorm(Pass):
    """`x * rsqrt(mean(x^2) + eps) * weight` becomes `rms_norm`; x is float of shape (..., C), weight (C,) or absent."""

    name = "fuse RMS norms"
    needs = "a canonical graph with folded constants"
    guarantees = (
        "every RMS norm over the last axis is `aten.rms_norm`, or gone where it has no elements; the outputs change by "
        "float rounding at most"
    )
    takes = gives = CANONICAL
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        matches = [match for node in graph_module.graph.nodes if (match := _match(node)) is not None]
        for last, x, weight, eps in matches:
            if is_empty(last):  # ONNX Runtime, which recognises the norm as well, refuses one of no channels
                last.replace_all_uses_with(x)
                continue
            with graph_module.graph.inserting_before(last):
                norm = graph_module.graph.call_function(aten.rms_norm.default, (x, [shape_of(x)[-1]], weight, eps))
            copy_meta(last, norm, last.meta["val"])
            last.replace_all_uses_with(norm)
        return bool(matches)


def _match(node: Node) -> tuple[Node, Node, Node | None, float] | None:
    """(last node, x, weight, eps) of the norm whose `x * rsqrt(...)` is `node`."""
    parts = _normalized(node)
    if parts is None:
        return None
    x, eps = parts
    channels = shape_of(x)[-1]
    if not isinstance(channels, int):
        return None
    if len(node.users) == 1:
        (user,) = node.users
        others = [a for a in user.args if a is not node] if user.target is aten.mul.Tensor else []
        gain = others[0] if len(others) == 1 and is_constant(others[0]) and is_tensor(others[0]) else None
        if isinstance(gain, Node) and shape_of(gain) == [channels]:
            return user, x, gain, eps
    return node, x, None, eps


def _normalized(node: Node) -> tuple[Node, float] | None:
    """(x, eps) where `node` is x divided by its root mean square."""
    if node.target is aten.mul.Tensor:
        for x, factor in (node.args[:2], node.args[1::-1]):
            eps = _inverse_root(factor, x)
            if eps is not None and isinstance(x, Node):
                return x, eps
    if node.target is aten.div.Tensor and _is(node.args[1], aten.sqrt.default):
        eps = _mean_square(node.args[1].args[0], node.args[0])  # type: ignore[union-attr]
        if eps is not None and isinstance(node.args[0], Node):
            return node.args[0], eps
    return None


def _inverse_root(node: Any, x: Any) -> float | None:
    """eps where `node` is `1 / sqrt(mean(x^2) + eps)`."""
    if _is(node, aten.rsqrt.default):
        return _mean_square(node.args[0], x)
    if _is(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        return _mean_square(node.args[0], x)
    if _is(node, aten.mul.Tensor) and node.args[1] in (1, 1.0):  # 1 / x is the reciprocal of x, times 1
        return _inverse_root(node.args[0], x)
    if _is(node, aten.reciprocal.default) and _is(node.args[0], aten.sqrt.default):
        return _mean_square(node.args[0].args[0], x)
    return None


def _mean_square(node: Any, x: Any) -> float | None:
    """eps where `node` is `mean(x^2, last axis, keepdim) + eps`."""
    if not (_is(node, aten.add.Tensor) and isinstance(node.args[1], (int, float)) and not node.kwargs):
        return None
    mean, eps = node.args
    if not (_is(mean, aten.mean.dim) and len(mean.args) > 2 and mean.args[2] and is_tensor(x)):
        return None
    if [int(d) for d in mean.args[1]] not in ([-1], [len(shape_of(x)) - 1]) or not shape_of(x):
        return None
    square = mean.args[0]
    squared = (_is(square, aten.pow.Tensor_Scalar) and square.args[0] is x and square.args[1] == 2) \
        or (_is(square, aten.mul.Tensor) and square.args[0] is x and square.args[1] is x) \
        or (_is(square, aten.square.default) and square.args[0] is x)
    return float(eps) if squared and x.meta["val"].dtype == torch.float32 else None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target
