"""Orthogonal matrices that spread an outlier channel over all channels (QuaRot, arXiv 2404.00456; SpinQuant, arXiv
2405.16406).
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, uniform over all of them, shape (size, size), float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.sign(torch.diagonal(r))


def fixing_ones(inner: Tensor) -> Tensor:
    """`U diag(1, Q) U^T`, the first column of U constant: orthogonal, rows and columns sum to 1.

    Such a rotation leaves the mean and the variance of a vector, so it commutes with a LayerNorm without gain and bias.

    Args:
        inner: Q, orthogonal of shape (size - 1, size - 1), float64.

    Returns:
        shape (size, size), float64.
    """
    size = len(inner) + 1
    # the Householder reflection that takes the first axis to the direction of ones is symmetric and its own inverse
    direction = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    direction[0] += 1
    direction = direction / direction.norm()
    whole = torch.eye(size, dtype=torch.float64)
    whole[1:, 1:] = inner
    whole = whole - 2 * torch.outer(direction, direction @ whole)
    return whole - 2 * torch.outer(whole @ direction, direction)


def rotation(size: int, seed: int, *, ones: bool) -> Tensor:
    """A rotation of vectors of `size` channels, shape (size, size), float64; the same seed gives the same.

    Args:
        ones: it must fix the vector of ones (see `fixing_ones`).
    """
    generator = torch.Generator().manual_seed(seed)
    if not ones:
        return random_orthogonal(size, generator)
    return fixing_ones(random_orthogonal(size - 1, generator)) if size > 1 else torch.eye(1, dtype=torch.float64)
