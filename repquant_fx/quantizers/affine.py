"""An affine of each channel, `x -> (x - shift) / factor`, moved into the constants around x, as pure functions.

What writes x takes it in, what reads x undoes it; together they compute what they did before. Float64 keeps that tight.
"""

from __future__ import annotations

from torch import Tensor


def into_writer(weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of what writes `(x - shift) / factor` in place of x. One without bias gains one.

    Args:
        weight: of a norm, shape (C,), or of a Linear, shape (C, in).
        bias, factor, shift: shape (C,).
    """
    divisor = factor if weight.ndim == 1 else factor[:, None]
    return weight / divisor, (-shift if bias is None else bias - shift) / factor


def into_reader(weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Linear that reads `(x - shift) / factor` in place of x. One without bias gains one.

    Args:
        weight: shape (out, C).
        bias: shape (out,).
        factor, shift: shape (C,).
    """
    moved = weight @ shift
    return scale_input(weight, factor), moved if bias is None else bias + moved


def scale_input(weight: Tensor, factor: Tensor) -> Tensor:
    """Weight (out, C) of a Linear whose input is divided by a factor of shape (C,)."""
    return weight * factor


def scale_output(weight: Tensor, bias: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a Linear whose output is multiplied by a factor of shape (out,)."""
    return weight * factor[:, None], None if bias is None else bias * factor
