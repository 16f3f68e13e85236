"""Weights of which a few inputs share a scale and a zero point: what kernels of weights alone take (MatMulNBits).

Groups are neighbouring inputs, so that nothing has to be permuted when the model runs. GPTQ still takes the columns in
the order of their energy, in two ways, of which each row keeps the better one:

- *column by column*, whatever their group, on grids that were chosen before the sweep;
- *group by group*, the group of most energy first, on grids that are chosen when the sweep reaches a group: from its
  weights as the errors of the groups before have moved them (the GPTQ paper's groups).

A grid is chosen by the error that the columns' energy weighs. What a zero point costs in memory it gains many times
below 5 bits; above, it is folded into the codes or left out (see `needs_zero_point`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.quantizers.gptq import (
    QuantizedWeight,
    WeightGrid,
    output_error,
    per_input,
    sweep,
    weight_grid,
)

MOST_PACKED = 4  # bits of a code of which two fill a byte; its zero point has as many


@dataclass(frozen=True)
class Grouping:
    """How the weights of one layer are rounded.

    Attributes:
        size: inputs that share a scale; 0 for all of them.
        search: choose ranges by the squared error, else min-max.
    """

    bits: int
    size: int = 0
    search: bool = True

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> WeightGrid:
        """The grid of each output channel and group, each of its tensors of shape (out * groups,).

        Args:
            weight: shape (out, in).
            importance: of the errors of each input, shape (in,).
        """
        outputs, groups = len(weight), self.groups(weight.shape[1])
        rows = self._rows(weight)
        weights = None if importance is None else self._rows(importance.expand_as(weight))
        if weights is not None:  # each group by itself: what counts is how its inputs compare
            weights = weights / weights.mean(1, keepdim=True).clamp(min=1e-30)
        assert len(rows) == outputs * groups
        return weight_grid(rows, self.bits, symmetric=self.bits == 8, search=self.search, importance=weights)

    def groups(self, inputs: int) -> int:
        """How many groups there are."""
        return -(-inputs // self.size) if self.size else 1

    def spans(self, inputs: int) -> list[tuple[int, int]]:
        """Where each group begins and ends."""
        size = self.size or inputs
        return [(start, min(start + size, inputs)) for start in range(0, inputs, max(1, size))]

    def _rows(self, values: Tensor) -> Tensor:
        """(out, in) as (out * groups, size); what the last group lacks is zeros."""
        size = self.size or values.shape[1]
        lacking = self.groups(values.shape[1]) * size - values.shape[1]
        return torch.nn.functional.pad(values, (0, lacking)).reshape(-1, size)

    def wide(self, grid: WeightGrid, inputs: int) -> WeightGrid:
        """A grid of each weight, its tensors of shape (out, in)."""
        groups = self.groups(inputs)
        tensors = (t.reshape(-1, groups) for t in (grid.scale, grid.low, grid.high))
        return WeightGrid(*(per_input(t, self.size or inputs, inputs) for t in tensors))

    def finished(self, codes: Tensor, grid: WeightGrid) -> QuantizedWeight:
        """As it is stored; a zero point that needs room is moved so that the codes are from -2^(bits-1) up.

        Args:
            codes: shape (out, in), with the zero point folded in.
            grid: of each channel and group, shapes (out * groups,).
        """
        inputs = codes.shape[1]
        shape = (-1, self.groups(inputs)) if self.size else (-1,)
        scale, zero_point = grid.scale.float().reshape(shape), None
        if needs_zero_point(self.bits):
            zero_point = (-grid.low - (1 << (self.bits - 1))).to(torch.int8).reshape(shape)
            codes = codes + per_input(zero_point, self.size, inputs)
        return QuantizedWeight(codes.to(torch.int8), scale, zero_point, self.size)


def needs_zero_point(bits: int) -> bool:
    """Whether codes of so many bits, in a type of 4, have no room for it."""
    return bits <= MOST_PACKED


def nearest(weight: Tensor, grouping: Grouping) -> QuantizedWeight:
    """Codes to nearest of a weight of shape (out, in)."""
    grid = grouping.grid(weight)
    return grouping.finished(_codes(weight, grouping.wide(grid, weight.shape[1])), grid)


def gptq_groups(weight: Tensor, hessian: Tensor, grouping: Grouping, *, damping: float = 0.01, block: int = 128,
                activation_order: bool = True, where: str = "") -> QuantizedWeight:
    """Quantize a weight in groups of inputs; each row as the one of several sweeps, or to nearest, that leaves the
    least output error.

    Args:
        weight: shape (out, in).
        hessian: `2 X^T X` of the layer's input, shape (in, in).
        damping, block, activation_order, where: as of `gptq`.
    """
    energy = hessian.diagonal()
    found = [nearest(weight, grouping)]
    exact = weight.to(hessian.dtype)
    for importance in (None, energy.to(weight.dtype)):
        grid = grouping.grid(weight, importance)
        wide = grouping.wide(grid, weight.shape[1])
        tensors = [t.T.to(exact.dtype) for t in (wide.scale, wide.low, wide.high)]
        order = torch.argsort(energy, descending=True, stable=True) if activation_order else torch.arange(len(energy))
        spans = [(start, min(start + block, len(order))) for start in range(0, len(order), block)]
        codes = sweep(exact, hessian, order, spans, lambda start, stop, *_, order=order, tensors=tensors: [
            WeightGrid(*(t[column] for t in tensors)) for column in order[start:stop].tolist()], damping, where)
        found.append(grouping.finished(codes, grid))
    if grouping.size:
        found.append(_by_groups(exact, hessian, grouping, damping, activation_order, where))
    return best(weight, hessian, found)


def _by_groups(weight: Tensor, hessian: Tensor, grouping: Grouping, damping: float, activation_order: bool,
               where: str) -> QuantizedWeight:
    energy, groups = hessian.diagonal(), grouping.spans(weight.shape[1])
    if activation_order:
        groups = sorted(groups, key=lambda span: -float(energy[slice(*span)].mean()))
        order = torch.cat([start + torch.argsort(energy[start:stop], descending=True, stable=True)
                           for start, stop in groups])
    else:
        order = torch.arange(len(energy))
    chosen: dict[int, WeightGrid] = {}

    def grids(start: int, stop: int, columns: Tensor, diagonal: Tensor) -> list[WeightGrid]:
        one = Grouping(grouping.bits, 0, grouping.search)
        # what GPTQ's own loss weighs the error of a column by
        grid = one.grid(columns.T.float(), diagonal.float().square().reciprocal())
        chosen[start] = grid
        exact = WeightGrid(*(t.to(columns.dtype) for t in (grid.scale, grid.low, grid.high)))
        return [exact] * (stop - start)

    spans, place = [], 0
    for start, stop in groups:
        spans.append((place, place + stop - start))
        place += stop - start
    codes = sweep(weight, hessian, order, spans, grids, damping, where)
    by_place = {start: chosen[place] for (start, _), (place, _) in zip(groups, spans)}
    ordered = [by_place[start] for start in sorted(by_place)]
    grid = WeightGrid(*(torch.stack(tensors, 1).flatten() for tensors in zip(
        *((g.scale, g.low, g.high) for g in ordered))))
    return grouping.finished(codes, grid)


def best(weight: Tensor, hessian: Tensor, found: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Of some ways to round a weight, for each row the first that leaves the least output error."""
    errors = torch.stack([output_error(weight, each.dequantize(), hessian) for each in found])
    which = errors.argmin(0)

    def picked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors))[which, torch.arange(len(weight))]

    zero_points = [each.zero_point for each in found if each.zero_point is not None]
    return QuantizedWeight(picked([each.codes for each in found]), picked([each.scale for each in found]),
                           picked(zero_points) if zero_points else None, found[0].group)


def _codes(weight: Tensor, wide: WeightGrid) -> Tensor:
    return torch.round(weight / wide.scale).clamp(wide.low, wide.high)
