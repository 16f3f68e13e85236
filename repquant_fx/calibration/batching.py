"""Batches of calibration data: their sizes, the samples of each, and a set that can hold some back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from repquant_fx.errors import CalibrationError

Batch: TypeAlias = tuple[Tensor, ...]


@dataclass
class CalibrationSet:
    """Checked calibration batches.

    Attributes:
        batches: one tuple of tensors per batch, in the order of the model's inputs; dimension 0 is the batch in all.
        origin: where they came from, for reports.
        synthetic: whether they were made up.
        batch_size: wanted size; 0 stands for that of the first batch.
        fixed_batch: the model takes batches of `batch_size` only.
        notes: what a person must know of data that was made up, in words.
    """

    batches: list[Batch]
    origin: str
    synthetic: bool
    batch_size: int = 0
    fixed_batch: bool = False
    notes: str = ""

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(_length(batch) for batch in self.batches)

    def split_held_back(self, n: int) -> tuple[CalibrationSet, CalibrationSet]:
        """The set to calibrate with, and the last samples held back to judge by.

        `n` samples are held back, or a quarter of the set where that is less, but one at least. A set of a single
        sample is used for both. With a fixed batch, whole batches move.

        Raises:
            CalibrationError: n < 1, or the set is empty.
        """
        if n < 1:
            raise CalibrationError(f"at least 1 sample must be held back, not {n}")
        if not self.batches:
            raise CalibrationError("the calibration set is empty")
        unit = _length(self.batches[0]) if self.fixed_batch else 1
        units = self.samples // unit
        if units < 2:
            return self, self
        start = unit * (units - min(-(-n // unit), max(1, units // 4)))
        return self._part(0, start), self._part(start, self.samples)

    def _part(self, start: int, stop: int) -> CalibrationSet:
        size = self.batch_size or _length(self.batches[0])
        bounds = [0]
        for length in batch_sizes(stop - start, size):
            bounds.append(bounds[-1] + length)
        batches = [_slice(self.batches, start + a, start + b) for a, b in pairwise(bounds)]
        return CalibrationSet(batches, self.origin, self.synthetic, size, self.fixed_batch)



def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Sizes of the batches for `count` samples: all `batch_size` but the last.

    A last batch of one sample is folded into the one before: some dynamic graphs want two samples at least.

    >>> batch_sizes(10, 4), batch_sizes(9, 4)
    ([4, 4, 2], [4, 5])
    """
    full, rest = divmod(count, batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes



def plan_batches(order: Sequence[int], batch_size: int, fixed: bool = False) -> list[list[int]]:
    """Sample indices of each batch, in order.

    With a fixed batch all have exactly `batch_size`: the rest is dropped, or, when there is less than one batch, the
    samples are repeated to fill it.
    """
    indices = list(order)
    if fixed:
        if indices and len(indices) < batch_size:
            indices = (indices * -(-batch_size // len(indices)))[:batch_size]
        indices = indices[:len(indices) // batch_size * batch_size]
    batches, start = [], 0
    for size in batch_sizes(len(indices), batch_size):
        batches.append(indices[start:start + size])
        start += size
    return batches



def _length(batch: Batch) -> int:
    return int(batch[0].shape[0])



def _slice(batches: Sequence[Batch], start: int, stop: int) -> Batch:
    """Samples start to stop, counted through all batches; a view where they lie in one batch."""
    pieces, offset = [], 0
    for batch in batches:
        length = _length(batch)
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            pieces.append(tuple(tensor[first:last] for tensor in batch))
        offset += length
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))
