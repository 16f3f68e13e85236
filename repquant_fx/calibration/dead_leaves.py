"""Procedural images with the statistics of photographs: leaves that hide each other, with textures of a 1/f spectrum.

The dead leaves model (A. B. Lee, D. Mumford, J. Huang, IJCV 2001): shapes whose sizes follow a power law of exponent -3
fall on each other. It has the edges, the even regions and the scale invariance of photographs, which noise has not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAVES = 4, 40  # of an image, drawn log-uniformly
_HALF_AXES = 1 / 8, 1.0  # in parts of the shorter side
_CHROMA = 0.1  # standard deviation of each channel around the brightness


def dead_leaves(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One image (C, H, W), float32 in [0, 1], of any number of channels; edges are a pixel wide."""
    channels, height, width = shape
    grain = pink_noise((2, height, width), generator, slope=1.0)
    image = _colour(channels, generator) + 0.2 * pink_noise((1, height, width), generator, slope=1.5)
    rows, columns, side = torch.arange(height)[:, None], torch.arange(width), min(height, width)
    few, many = _LEAVES
    smallest, largest = _HALF_AXES
    count, contrast = torch.rand(2, generator=generator).tolist()
    for draw in torch.rand(round(few * (many / few)**count), 8, generator=generator).tolist():
        size = side * (smallest**-2 + draw[0] * (largest**-2 - smallest**-2))**-0.5
        axes = size * math.exp(0.8 * draw[1] - 0.4), size * math.exp(0.4 - 0.8 * draw[1])
        y, x, reach = draw[2] * height, draw[3] * width, math.hypot(*axes) + 1
        down = slice(max(0, math.floor(y - reach)), math.ceil(y + reach))
        right = slice(max(0, math.floor(x - reach)), math.ceil(x + reach))
        covered = _leaf(rows[down] - y, columns[right] - x, axes, math.pi * draw[4], round=draw[5] < 0.5)
        leaf = _colour(channels, generator) + 0.25 * draw[7] * grain[int(2 * draw[6])][down, right]
        part = image[:, down, right]
        part += covered * (leaf - part)
    light = torch.exp(0.3 * pink_noise((1, height, width), generator, slope=2.0))
    return ((image * light - 0.5) * (0.5 + 0.5 * contrast) + 0.5).clamp(0, 1)


def pink_noise(shape: tuple[int, int, int], generator: torch.Generator, slope: float) -> Tensor:
    """Gaussian fields (N, H, W) whose amplitude falls as 1/f^slope with the frequency; each has mean 0, variance 1."""
    _, height, width = shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    frequency[0, 0] = math.inf
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator)) * frequency**-slope
    field = torch.fft.irfft2(spectrum, s=(height, width))
    return field / field.std(dim=(1, 2), keepdim=True, correction=0).clamp_min(1e-6)


def _leaf(y: Tensor, x: Tensor, axes: tuple[float, float], angle: float, *, round: bool) -> Tensor:
    """How much of each pixel (H, W) an ellipse covers, or a rectangle."""
    u = (math.cos(angle) * x + math.sin(angle) * y) / axes[0]
    v = (math.cos(angle) * y - math.sin(angle) * x) / axes[1]
    distance = torch.hypot(u, v) if round else torch.maximum(u.abs(), v.abs())
    return (0.5 + (1 - distance) * min(axes)).clamp(0, 1)


def _colour(channels: int, generator: torch.Generator) -> Tensor:
    """(channels, 1, 1): a brightness, and less of colour around it."""
    draw = torch.randn(channels, 1, 1, generator=generator)
    return torch.rand(1, generator=generator) + _CHROMA * draw
