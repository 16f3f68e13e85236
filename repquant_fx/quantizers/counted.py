"""The part of a tensor that counts: all but what fills rows up, where `counts` says what that is.

`counts` is boolean and broadcasts to the tensor; everything counts where it is None.
"""

from __future__ import annotations

import torch
from torch import Tensor


def which_rows(x: Tensor, counts: Tensor | None) -> Tensor | None:
    """Which vectors of the last axis count, at least in part: boolean, one for each; None for all."""
    return None if counts is None else counts.any(-1).expand(x.shape[:-1]).reshape(-1)


def picked(rows: Tensor, which: Tensor | None) -> Tensor:
    """Some of the rows; all where it is None."""
    return rows if which is None else rows[which]


def counted_rows(x: Tensor, counts: Tensor | None) -> Tensor:
    """The vectors of the last axis that count, in order: shape (n, D)."""
    return picked(x.reshape(-1, x.shape[-1]), which_rows(x, counts))


def counted_values(x: Tensor, counts: Tensor | None) -> Tensor:
    """The values that count, in order: shape (n,)."""
    return x.reshape(-1) if counts is None else x[counts.expand(x.shape)]


def zero_elsewhere(x: Tensor, counts: Tensor | None) -> Tensor:
    """`x`, with zeros where it does not count."""
    return x if counts is None else torch.where(counts, x, 0)
