"""Inputs, calibration batches and recipes, as the strategies draw them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from small_layers import SIZES
from torch import Tensor

from repquant_fx import LayerRule, Recipe

WIDE = (torch.float64, torch.float16, torch.bfloat16)
SHAPES = st.one_of(
    st.lists(SIZES, min_size=1, max_size=3),
    st.sampled_from([[8], [4, 8], [4, 4], [3, 4, 4], [4, 4, 8], [2, 3, 4]]),  # as transformers have them
)
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda x: x, "zero": torch.zeros_like, "equal": lambda x: torch.full_like(x, 0.7),
    "positive": torch.abs,
    "large": lambda x: x * 1e6, "huge": lambda x: x * 1e17, "beyond": lambda x: x * 1e30, "tiny": lambda x: x * 1e-20,
    "denormal": lambda x: x * 1e-41, "far from zero": lambda x: x * 1e-3 + 1e3, "not finite": lambda x: x / 0,
    "an outlier": lambda x: torch.where(x == x.max(), x * 1e4, x) if x.numel() else x,
}


@st.composite
def inputs_of(draw: Any) -> tuple[Tensor, ...]:
    """Example inputs: 1 to 3, float, integer or boolean; a common first axis of 2 (or 1, or 0)."""
    batch = draw(st.sampled_from([*[2] * 12, 3, 1, 0]))
    made: list[Tensor] = []
    for index in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        shape = [batch, *draw(SHAPES if index == 0 else st.lists(SIZES, max_size=3))]
        others = ["int", "int", "bool", "wide"]
        kind = draw(st.sampled_from(["float", "float", *others[1:3]] if index else [*["float"] * 9, *others]))
        plain = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
        dtype = plain[kind] if kind in plain else draw(st.sampled_from(WIDE))
        made.append(laid_out(draw, fresh(shape, dtype, index)))
    if len(made) == 2 and draw(st.integers(0, 5)) == 0:
        made[1] = made[0]  # one tensor for both
    return tuple(made)


def laid_out(draw: Any, x: Tensor) -> Tensor:
    """The values of `x`; a few times not contiguous, or of a larger tensor."""
    how = draw(st.sampled_from([*["as it is"] * 8, "turned", "part", "repeated"]))
    if how == "turned":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "part":
        return torch.stack([x, x], -1)[..., 0]
    return x[:1].expand_as(x) if how == "repeated" and x.shape[0] else x


def fresh(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random values; integers are 0 to 4."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    if dtype == torch.int64:
        return (values.abs() * 2).long().clamp(0, 4)
    return values > 0 if dtype == torch.bool else values.to(dtype)


@st.composite
def batches_of(draw: Any, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """One to three calibration batches like the inputs, of 1 to 20 samples, now and then of odd values."""
    change = VALUES[draw(st.sampled_from([*["as drawn"] * 12, *VALUES]))]
    counts = draw(st.lists(st.sampled_from([2, 4, 4, 20, 1]), min_size=1, max_size=3))

    def samples(like: Tensor, count: int, seed: int) -> Tensor:
        x = fresh([count if like.shape[0] in (2, 3) else like.shape[0], *like.shape[1:]], like.dtype, seed)
        return change(x) if x.is_floating_point() else x

    return [tuple(samples(t, n, seed * 8 + i) for i, t in enumerate(inputs)) for seed, n in enumerate(counts, 1)]


@st.composite
def recipes(draw: Any) -> Recipe:
    """A recipe with rules for some layers."""
    bits, some = st.integers(2, 8), st.integers(0, 5)
    rules = [
        LayerRule(
            draw(st.sampled_from(["*", "fc*", "*fc", "*0*", "linear"])),
            wbits=draw(st.none() | bits),
            abits=draw(st.none() | bits),
            gptq=draw(st.sampled_from([None, None, False])),
            skip=draw(st.sampled_from([None, None, None, True])),
        )
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2])))
    ]
    return Recipe(
        wbits=draw(bits),
        abits=draw(bits),
        input_bits=draw(st.sampled_from([8, 8, 2, 5])),
        norm=draw(st.sampled_from(["reparameterize", "reparameterize", "layerwise", "channelwise", "smooth"])),
        softmax=draw(st.sampled_from(["log", "log_sqrt2", "log2", "uniform"])),
        container=draw(st.sampled_from(["int8", "int8", "int4"])),
        softmax_scale=draw(st.sampled_from(["output", "percentile"])),
        correction=draw(st.booleans()),
        equalize=draw(st.sampled_from([
            ("values", "linear", "keys"), ("values", "query_key", "linear"), ("query_key",), ("keys",), (),
        ])),
        rotate=draw(st.sampled_from([(), (), (), ("residual",), ("heads",), ("residual", "heads")])),
        gptq=draw(st.booleans()),
        gptq_damping=0.0 if draw(some) == 0 else 0.01,
        gptq_block=1 if draw(some) == 0 else 128,
        gptq_activation_order=draw(st.booleans()),
        activations=draw(st.sampled_from(["mse", "percentile", "minmax"])),
        percentile=50.0 if draw(some) == 0 else 99.9,
        weights=draw(st.sampled_from(["mse", "minmax"])),
        clipping=draw(st.sampled_from(["search", "search", "none", "adam"])),
        layers=tuple(rules),
    )
