"""Integer products on x86 processors without VNNI, exactly: what `vpmaddubsw` makes of uint8 activations and int8
weights.

The instruction multiplies bytes and adds each two neighbours in 16 bits that saturate; the sums of pairs are then added
in 32 bits. Two products of 255 and 127 are 64,770, twice what 16 bits hold. Weights of 7 bits never get there: the
worst pair is -2 * 255 * 64 = -32,640.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST = -(1 << 15), (1 << 15) - 1


def saturating_product(activations: Tensor, weights: Tensor) -> Tensor:
    """`activations @ weights.T`, as these processors compute it.

    Args:
        activations: codes in [0, 255], shape (..., K), any integer dtype.
        weights: codes in [-128, 127], shape (N, K).

    Returns:
        int64, shape (..., N). Neighbours along K are added in pairs, from the first on; an odd K ends in a pair with
        zero.
    """
    odd = weights.shape[-1] % 2
    a, w = (torch.nn.functional.pad(t.long(), (0, odd)).unflatten(-1, (-1, 2)) for t in (activations, weights))
    total = torch.zeros(*a.shape[:-2], w.shape[0], dtype=torch.int64)
    for k in range(w.shape[1]):  # all pairs at once would take K / 2 times the memory
        total += (a[..., k, :] @ w[:, k].T).clamp(LEAST, MOST)
    return total


def can_saturate(weights: Tensor, top: int = 255) -> Tensor:
    """Of each output channel, whether two of its weights are such that the sum of a pair may saturate, in whatever
    order a kernel takes them.

    Args:
        weights: codes, shape (N, ...), any integer dtype.
        top: the highest code of the activations.

    Returns:
        boolean, shape (N,).
    """
    rows = weights.flatten(1).int()
    count = min(2, rows.shape[1])
    high = rows.topk(count, dim=1).values.clamp(min=0).sum(1)
    low = rows.topk(count, dim=1, largest=False).values.clamp(max=0).sum(1)
    return (high * top > MOST) | (low * top < LEAST)
