"""Architectures at a small size: what both libraries share. `shrink_timm` and `shrink_transformers` make numbers of
layers, widths, heads and pixels small, by what they are called; what cannot be built and run so is tried with fewer of
them changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS, SIDE, TOKENS = 32, 2, 2, 48, 96, 64, 64, 12
LARGEST = 80_000_000  # parameters of a model that counts as small


class NotSmall(Exception):
    """No small model of an architecture could be built and run; says why."""


def redrawn(model: nn.Module) -> nn.Module:
    """Weights drawn anew: as they are initialised, many outputs are nearly zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                matrix = name.endswith("weight") and parameter.ndim >= 2
                parameter.copy_(noise / math.sqrt(parameter[0].numel()) if matrix
                                else torch.exp(0.3 * noise) if name.endswith("weight") else 0.3 * noise)
    return model.eval()


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, weights drawn anew; one that is too large takes no memory.

    Raises:
        NotSmall: it has too many parameters.
        Exception: whatever `build` raises.
    """
    try:
        with torch.device("meta"):
            skeleton = build()
    except Exception:  # some need values; what else is wrong, building in earnest says
        skeleton = nn.Module()
    _check_size(skeleton)
    model = build()
    _check_size(model)
    return redrawn(model)


def check_runs(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> None:
    """Run it once.

    Raises:
        Exception: whatever the model raises.
    """
    with torch.inference_mode():
        model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def said(error: Exception) -> str:
    """What an error says, without the names that some wrap it in."""
    text = " ".join(str(error).split())
    return text.rpartition("ValueError: ")[2] if "Class validation" in text else f"{type(error).__name__}: {text}"


def _check_size(model: nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise NotSmall(f"the smallest that was found has {size / 1e6:.0f} M parameters")
