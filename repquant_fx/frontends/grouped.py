"""Grouped products (mixtures of experts) in visible operators: a product per group, of which each row keeps its own's.

How many rows a group has is known only when the model runs, so every group computes all rows: as many products as there
are groups, each with a weight of its own that is quantized like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decompose_grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r times the weight of the group that it belongs to; zeros for rows behind the last group.

    Args:
        rows: shape (R, I), the rows of the first group first.
        weight: shape (G, I, O).
        ends: shape (G,), integers, where each group's rows end.

    Returns:
        shape (R, O).
    """
    position = torch.arange(rows.shape[0], device=rows.device)[:, None]
    result = torch.zeros((), dtype=rows.dtype, device=rows.device)
    start: Tensor | int = 0
    for index in range(weight.shape[0]):
        end = ends[index]
        mine = (position >= start) & (position < end)  # ahead of the product: calibration asks which rows count
        result = torch.where(mine, torch.nn.functional.linear(rows, weight[index].transpose(0, 1)), result)
        start = end
    return result


def grouped_rules() -> dict[Any, Any]:
    """Decompositions of the operators of this kind that libraries have registered so far."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if fallback is None else {fallback.default: decompose_grouped}
