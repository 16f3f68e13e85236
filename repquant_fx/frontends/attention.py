"""Attention in visible operators: MatMul, Softmax, MatMul in place of scaled_dot_product_attention.

torch's math decomposition is wrong with boolean masks on this path, and its default table would break Linear apart, so
that the rule is our own. So is the one for a bilinear layer, which torch cannot trace with sizes that are symbols.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repquant_fx.frontends.grouped import grouped_rules


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
            return decompose_attention(*args, **(kwargs or {}))
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
        return _with_reshapes(program).run_decompositions(rules).module(check_guards=False)


def _with_reshapes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy whose views may copy: torch's attention gives its result in an order of memory that some views rely on."""
    copied = copy.deepcopy(program)
    for node in copied.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    copied.graph_module.recompile()
    return copied
