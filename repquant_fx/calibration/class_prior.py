"""Images moved towards what a classifier takes for its classes, so that the last layers see what real images give them.

PSAQ-ViT (Z. Li et al., arXiv 2203.02250) matches random classes with a cross-entropy and keeps the image smooth by its
total variation. Its third term, the entropy of the similarities between patches, is left out: dead leaves have diverse
patches already, and on a ViT for CIFAR-10 at W4A4 it gained 0.2 dB and no accuracy for twice the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repquant_fx.calibration.batching import batch_sizes
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.progress import progress

STEPS = 20
_RATE = 0.1  # of Adam, in standard deviations of the preprocessing
_SMOOTHNESS = 1.0
_JITTER = 2  # pixels


def towards_classes(
    graph_module: Callable[..., Any], images: Tensor, low: Tensor, high: Tensor, generator: torch.Generator,
    batch_size: int,
) -> Tensor:
    """Gradient descent on images (N, C, H, W), float; the model is not changed.

    Args:
        graph_module: takes the images and gives scores (N, classes) as its first output.
        images: where the descent starts.
        low, high: bounds of the pixels, (C, 1, 1).
        generator: of the targets and the jitter.
        batch_size: images at a time.

    Returns:
        As many images, within the bounds.

    Raises:
        ValueError: the first output is no score of classes.
        RuntimeError: the model cannot be differentiated, or what it gives is not finite.
    """
    sizes, made = batch_sizes(len(images), batch_size), []
    with torch.inference_mode(False), torch.enable_grad():
        for part in progress(images.split(sizes), len(sizes), "synthesising images"):
            made.append(_descend(graph_module, part.clone(), low, high, generator))
    return torch.cat(made)


def _descend(
    graph_module: Callable[..., Any], pixels: Tensor, low: Tensor, high: Tensor, generator: torch.Generator
) -> Tensor:
    pixels.requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=_RATE, betas=(0.5, 0.9))
    target: Tensor | None = None
    for _ in range(STEPS):
        down, right, flip = torch.randint(-_JITTER, _JITTER + 1, (3,), generator=generator).tolist()
        moved = pixels.roll((down, right), (2, 3))
        scores = tensors_in(graph_module(moved.flip(3) if flip > 0 else moved))[0]
        if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) != len(pixels):
            raise ValueError("it gives no scores of classes")
        if not scores.requires_grad:
            raise RuntimeError("it cannot be differentiated")
        if target is None:
            target = torch.randint(scores.shape[1], (len(pixels),), generator=generator)
        loss = torch.nn.functional.cross_entropy(scores.float(), target) + _SMOOTHNESS * _total_variation(pixels)
        (pixels.grad,) = torch.autograd.grad(loss, [pixels])
        if not bool(torch.isfinite(pixels.grad).all()):
            raise RuntimeError("its gradient is not finite")
        optimizer.step()
        with torch.no_grad():
            pixels.copy_(pixels.maximum(low).minimum(high))
    return pixels.detach()


def _total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels."""
    return images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()
