"""Least-squares correction of a Linear for what quantization upstream and at its own input did to its output.

GPTQ preserves `X^ W^T`, the product with the *quantized* input. What the layer should give is the float model's `Y = X W^T + b`.
Before rounding, the weights and bias are moved to the ridge regression of Y on the quantized input X^; after rounding the bias is
set so that the mean output is that of Y. Beyond the paper; both are closed forms of second moments that GPTQ needs anyway.

The strength of the ridge is chosen by cross-validation between two halves of the batches, so that a layer with few samples
(a classifier head) is not overfitted: where no correction helps on the other half, none is made. Of the fitted correction half is
applied: the next layers make up for what is left, so that nothing is lost on data like the calibration's, and a model that then sees
other data (a sentence encoder calibrated on encyclopaedia text) is bent less towards what it was calibrated on.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5  # share of the fitted correction that is applied
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean variance of the inputs


class Moments:
    """Sums over tokens, in float64, of a quantized input x (n, in) and the residual r (n, out) that the output still lacks."""

    def __init__(self) -> None:
        self.count = 0
        self.x: Tensor | None = None

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Accumulate one batch; products in float32, sums in float64."""
        parts = (x.sum(0, dtype=torch.float64), residual.sum(0, dtype=torch.float64), (x.T @ x).double(), (residual.T @ x).double())
        if self.x is None:
            self.x, self.r, self.xx, self.rx = parts
        else:
            for total, part in zip((self.x, self.r, self.xx, self.rx), parts):
                total += part
        self.count += len(x)

    def __add__(self, other: Moments) -> Moments:
        if self.x is None or other.x is None:
            return self if other.x is None else other
        result = Moments()
        result.count = self.count + other.count
        result.x, result.r, result.xx, result.rx = self.x + other.x, self.r + other.r, self.xx + other.xx, self.rx + other.rx
        return result

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """Means of x and r."""
        assert self.x is not None
        return self.x / self.count, self.r / self.count

    @property
    def covariance(self) -> tuple[Tensor, Tensor]:
        """Centred second moments a token: of x, shape (in, in), and of r with x, shape (out, in)."""
        x, r = self.mean
        return self.xx / self.count - x[:, None] * x, self.rx / self.count - r[:, None] * x


def fit(first: Moments, second: Moments) -> Tensor:
    """What to add to the weight, shape (out, in): ridge chosen across the two halves and refitted on both, 0 where none helps."""
    whole = first + second
    xx, rx = whole.covariance
    if first.count < 2 or second.count < 2:
        return torch.zeros_like(rx)
    gains = dict.fromkeys(RIDGES, 0.0)
    for train, test in ((first, second), (second, first)):
        values, vectors = torch.linalg.eigh(train.covariance[0])
        rotated = train.covariance[1] @ vectors
        test_xx, test_rx = test.covariance
        test_xx, test_rx = vectors.T @ test_xx @ vectors, test_rx @ vectors
        for ridge in RIDGES:
            delta = rotated / (values.clamp(min=0) + ridge * values.mean().clamp(min=1e-30))
            gains[ridge] += float(2 * (delta * test_rx).sum() - ((delta @ test_xx) * delta).sum())
    best = max(gains, key=gains.__getitem__)
    if not gains[best] > 0:
        return torch.zeros_like(rx)
    damped = xx.clone()
    damped.diagonal().add_(best * xx.diagonal().mean().clamp(min=1e-30))
    return STRENGTH * torch.linalg.solve(damped, rx.T).T
