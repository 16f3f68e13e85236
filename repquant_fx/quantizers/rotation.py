"""Orthogonal matrices that spread an outlier channel over all channels (QuaRot, arXiv 2404.00456; SpinQuant, arXiv
2405.16406), and what they do to the constants around. A rotation R of shape (size, size) takes vectors x to x R.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_GAIN = 1e-3  # relative to the largest: below, a bias that stays with its norm cannot be divided by the gain


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


def rotate_vectors(values: Tensor, matrix: Tensor) -> Tensor:
    """Every vector along the last axis, which holds one or several."""
    size = len(matrix)
    return values @ matrix if values.shape[-1] == size else (values.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def rotate_rows(constant: Tensor, matrix: Tensor, block: int) -> Tensor:
    """Weight (out, ...) or bias (out,) of what writes vectors into a block of its output channels."""
    size = len(matrix)
    rows, rotated = slice(block * size, (block + 1) * size), constant.clone()
    part = constant[rows]
    rotated[rows] = part @ matrix if constant.ndim == 1 else torch.tensordot(matrix.T, part, dims=1)
    return rotated


def rotate_columns(weight: Tensor, matrix: Tensor, block: int) -> Tensor:
    """Weight (out, in, ...) of what reads rotated vectors from a block of its input channels."""
    size, rotated = len(matrix), weight.clone()
    columns = rotated.narrow(1, block * size, size)
    columns.copy_(torch.tensordot(columns, matrix, dims=([1], [0])).movedim(-1, 1))
    return rotated


def gain_divides(gain: Tensor) -> bool:
    """Whether a bias can be divided by the gain of its norm."""
    return bool(gain.abs().min() > SMALLEST_GAIN * gain.abs().max())


def rotated_bias(bias: Tensor, gain: Tensor, matrix: Tensor) -> Tensor:
    """The bias of a norm that keeps it while its gain moves on and its output is rotated, shape (C,)."""
    return rotate_vectors(bias / gain, matrix)
