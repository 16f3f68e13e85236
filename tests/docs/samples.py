"""The tiny model of the samples, and inputs for it."""

from __future__ import annotations

import torch
from helpers import vit
from torch import Tensor, nn

PIXELS = 8


def model() -> nn.Module:
    return vit(depth=1, img_size=PIXELS, embed_dim=16)


def images() -> Tensor:
    return torch.randn(64, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))
