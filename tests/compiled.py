"""Tiny models compiled once a session, for the tests of files and of the Python API. What is returned must not be
changed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from helpers import redraw, swin, vit
from torch import nn

from repquant_fx import CompiledModel, Recipe, compile

PLAIN: dict[str, Any] = {
    "correction": False,
    "gptq": False,
    "clipping": "none",
    "activations": "minmax",
    "weights": "minmax",
    "softmax_scale": "percentile",
    "rotate": (),
}


def small_swin(seed: int = 0) -> nn.Module:
    """One stage: a plain and a shifted window."""
    import timm

    return redraw(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=8,
            patch_size=2,
            window_size=2,
            embed_dim=16,
            depths=(2,),
            num_heads=(2,),
            num_classes=5,
        ),
        seed,
    )


@functools.cache
def compiled(
    name: str, wbits: int, abits: int | None = None, *, method: str = "plain", **changes: Any
) -> CompiledModel:
    """`name` is vit, swin or small_swin; `method` is plain (fast) or repquant."""
    model = {"vit": vit, "swin": swin, "small_swin": small_swin}[name]()
    recipe = Recipe(
        wbits=wbits, abits=wbits if abits is None else abits, **{**(PLAIN if method == "plain" else {}), **changes}
    )
    return compile(model, recipe=recipe, calibration=inputs(name), batch_size=8)


def inputs(name: str, count: int = 24, seed: int = 1) -> torch.Tensor:
    """Images of the size that the model takes."""
    side = 8 if name == "small_swin" else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
