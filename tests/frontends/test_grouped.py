"""Grouped products out of visible operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repquant_fx.frontends.capture import capture
from repquant_fx.frontends.grouped import decompose_grouped

WEIGHT = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))


def expected(rows: Tensor, ends: list[int]) -> Tensor:
    result, start = torch.zeros(len(rows), WEIGHT.shape[2]), 0
    for weight, end in zip(WEIGHT, ends):
        result[start:end] = rows[start:end] @ weight
        start = end
    return result


def test_each_row_meets_the_weight_of_its_group() -> None:
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    for ends in ([2, 5, 7], [0, 4, 4], [7, 7, 7], [1, 1, 6]):  # groups of no rows, and rows of no group
        torch.testing.assert_close(decompose_grouped(rows, WEIGHT, torch.tensor(ends)), expected(rows, ends))


def test_the_operator_of_transformers_becomes_linears() -> None:
    from transformers.integrations import moe  # noqa: F401 - registers the operator

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(WEIGHT)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)

    captured = capture(Grouped().eval(), [torch.randn(7, 8), torch.tensor([2, 5, 7])],
                       dynamic_axes=[{0: "rows"}, {}])
    targets = [node.target for node in captured.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == len(WEIGHT)
    rows = torch.randn(9, 8)
    torch.testing.assert_close(captured.graph_module(rows, torch.tensor([3, 3, 8])), expected(rows, [3, 3, 8]))
