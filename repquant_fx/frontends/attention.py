"""Attention in visible operators: MatMul, Softmax, MatMul in place of scaled_dot_product_attention.

torch's math decomposition is wrong with boolean masks on this path, and its default table would break Linear apart, so
that the rule is our own. So is the one for a bilinear layer, which torch cannot trace with sizes that are symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from repquant_fx.frontends.grouped import grouped_rules

aten = torch.ops.aten


def decompose_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """`softmax(q k^T * scale + mask) v` out of visible operators; arguments and result are those of torch's.

    Masked logits become `finfo.min`, not -inf: a row that is masked whole (left padding) stays finite.
    """
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        if groups > 1:
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
    logits = torch.matmul(query * factor, key.transpose(-2, -1))
    lowest = torch.finfo(logits.dtype).min
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        cols = torch.arange(key.shape[-2], device=query.device)[None, :]
        logits = logits.masked_fill(cols > rows, lowest)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, lowest) if attn_mask.dtype == torch.bool else logits + attn_mask
    return torch.matmul(torch.softmax(logits, -1), value)


def decompose_bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`first^T W_o second` for each output o, as a linear layer of `first` whose result is multiplied by `second`.

    Args:
        first, second: shapes (..., I) and (..., J).
        weight: shape (O, I, J).
        bias: shape (O,).
    """
    outputs, width, other = weight.shape
    matrix = weight.transpose(1, 2).reshape(outputs * other, width)
    products = torch.nn.functional.linear(first, matrix).unflatten(-1, (outputs, other))
    result = (products * second.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


class VisibleAttention(TorchFunctionMode):
    """Runs a model with `decompose_attention`: it differs from torch's in rows that are masked whole, which is padding.

    There torch gives zeros, the decomposition a mean; nothing reads either. The graph is judged on everything else.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            found = decompose_attention(*args, **(kwargs or {}))
            # in the order of memory of torch's, on which a view may rely
            return found.transpose(1, 2).contiguous().transpose(1, 2) if found.ndim == 4 else found
        return func(*args, **(kwargs or {}))


def decomposed(program: torch.export.ExportedProgram) -> nn.Module:
    """The program as a module whose attention, bilinear layers and grouped products are in visible operators; all else
    stays whole.
    """
    rules: dict[Any, Any] = {
        torch.ops.aten.scaled_dot_product_attention.default: decompose_attention,
        torch.ops.aten.bilinear.default: decompose_bilinear,
        **grouped_rules(),
    }
    try:
        return program.run_decompositions(rules).module(check_guards=False)
    except (RuntimeError, ValueError) as error:
        if "view" not in str(error):
            raise
    with _reshapes_behind_attention(program):
        return program.run_decompositions(rules).module(check_guards=False)


@contextmanager
def _reshapes_behind_attention(program: torch.export.ExportedProgram) -> Iterator[None]:
    """Views of what attention gives may copy, for the block: torch gives it in an order of memory that they rely on,
    and the rule in another.
    """
    attention, moved = aten.scaled_dot_product_attention.default, (aten.transpose.int, aten.permute.default)
    found = []
    for node in program.graph.nodes:
        behind = node
        while behind.target in (aten.view.default, *moved) and behind.args:
            behind = behind.args[0]
        if node.target is aten.view.default and behind.target is attention:
            found.append(node)
    _retarget(program, found, aten.reshape.default)
    try:
        yield
    finally:
        _retarget(program, found, aten.view.default)


def _retarget(program: torch.export.ExportedProgram, nodes: Sequence[Node], target: Any) -> None:
    for node in nodes:
        node.target = target
    if nodes:
        program.graph_module.recompile()
