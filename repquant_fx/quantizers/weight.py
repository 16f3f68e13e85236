"""Choose the integer codes of a weight, as pure functions: tensors in, codes and scales out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repquant_fx.quantizers.correction import Moments
from repquant_fx.quantizers.gptq import QuantizedWeight, WeightGrid, gptq, output_error, round_to_nearest, weight_grid
from repquant_fx.quantizers.groups import Grouping, gptq_groups
from repquant_fx.quantizers.groups import nearest as rounded_to_nearest
from repquant_fx.recipe import Recipe

BIAS_ROOM = 2.0**30  # of an int32: what a bias may take, so that the product can still be added to it
ORDINARY_SCALE = 1e-4  # of a weight that is zero: fine enough for the bias, which is all there is


@dataclass(frozen=True)
class ChosenWeight:
    """What a layer's weight becomes.

    Attributes:
        weight: codes in the shape of the float weight, scales of shape (out,).
        bias: float32, shape (out,); None where the old one stays.
        errors: (round-to-nearest's, chosen) output error, where there was a Hessian.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    errors: tuple[float, float] | None


def chosen_grid(weight: Tensor, bits: int, recipe: Recipe, importance: Tensor | None = None) -> WeightGrid:
    """The grid that a weight of shape (out, in) is rounded to; `importance` as in `weight_grid`."""
    return weight_grid(weight, bits, symmetric=fills_container(bits), search=recipe.weights == "mse",
                       importance=importance)


def to_nearest(bits: int, recipe: Recipe, weight: Tensor) -> Tensor:
    """The values that a weight of shape (out, in) has once each is rounded to nearest."""
    return chosen_grid(weight, bits, recipe).values(weight)


def round_weight(weight: Tensor, bits: int, hessian: Tensor | None, recipe: Recipe, use_gptq: bool, where: str,
                 grouping: Grouping | None = None) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Codes to nearest, and the codes chosen. Rows are independent of each other.

    Args:
        weight: shape (out, in), float32.
        hessian: `2 X^T X` of the input, shape (in, in), float64; None where there is none for this kind of layer.
        where: names the layer in errors.
        grouping: of a weight whose activations stay in float; one scale per output channel where None.
    """
    if grouping is not None:
        to_nearest = rounded_to_nearest(weight, grouping)
        if not use_gptq or hessian is None:
            return to_nearest, to_nearest
        return to_nearest, gptq_groups(weight, hessian, grouping, damping=recipe.gptq_damping, block=recipe.gptq_block,
                                       activation_order=recipe.gptq_activation_order, where=where)
    grid = chosen_grid(weight, bits, recipe)
    nearest = round_to_nearest(weight, grid)
    if not use_gptq or hessian is None:
        return nearest, nearest
    # a second grid, chosen where the inputs have their energy; keep whichever ends with the smaller output error
    weighted = chosen_grid(weight, bits, recipe, importance=hessian.diagonal().float())
    results = [gptq(weight, hessian, g, damping=recipe.gptq_damping, block=recipe.gptq_block,
                    activation_order=recipe.gptq_activation_order, where=where) for g in (grid, weighted)]
    costs = [output_error(weight, r.dequantize(), hessian) for r in results]
    first = costs[0] <= costs[1]
    return nearest, QuantizedWeight(torch.where(first[:, None], results[0].codes, results[1].codes),
                                    torch.where(first, results[0].scale, results[1].scale))


def corrected_bias(
    weight: Tensor, bias: Tensor | None, quantized: QuantizedWeight, moments: Moments, layer: int
) -> Tensor:
    """The bias that makes the mean output the float model's, float32, shape (out,).

    Args:
        weight, bias: before rounding, shapes (out, in) and (out,).
        quantized: what the weight becomes.
        moments: of the layer's quantized input and of what its output lacks.
        layer: which of the layers of `moments` it is.
    """
    lost = (weight.double() - quantized.dequantize().double()) @ moments.mean
    shift = moments.mean_residual(layer) + lost
    return (shift if bias is None else shift + bias.double()).float()


def with_ordinary_scales(quantized: QuantizedWeight) -> QuantizedWeight:
    """The same weight; the scales of all-zero rows, which are free to choose, made ordinary, so that their bias fits an
    int32.
    """
    codes, scale = quantized.codes, quantized.scale
    dead = codes.reshape(len(codes), -1).eq(0).all(dim=1)
    if not bool(dead.any()) or bool(dead.all()):
        return QuantizedWeight(codes, torch.where(dead, torch.full_like(scale, ORDINARY_SCALE), scale))
    return QuantizedWeight(codes, torch.where(dead, scale[~dead].median(), scale))


def with_room_for_bias(quantized: QuantizedWeight, bias: Tensor, step: float) -> QuantizedWeight:
    """Scales so large that the bias fits int32 in steps of its product.

    A bias that the file leaves in float ONNX Runtime turns into such an int32 all the same, and it saturates. What the
    weight loses here is less than float32 holds beside that bias.

    Args:
        bias: shape (out,).
        step: scale of the layer's input.
    """
    codes, scale = quantized.codes, quantized.scale
    wanted = torch.maximum(scale, (bias.abs().double() / step / BIAS_ROOM).float())
    shrunk = torch.round(codes * (scale / wanted).reshape(-1, *[1] * (codes.ndim - 1)))
    return replace(quantized, codes=shrunk.to(codes.dtype), scale=wanted)


def fills_container(bits: int) -> bool:
    """4 bits fill INT4 and 8 bits fill INT8: no room to fold a zero point into the codes. 7 bits fill what sums of
    16 bits hold on processors without VNNI (see `saturation`), which is what 7 bits are for."""
    return bits in (4, 7, 8)
