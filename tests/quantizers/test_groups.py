"""Weights in groups of inputs: grids, the codes that are stored, and GPTQ's orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repquant_fx.quantizers.gptq import QuantizedWeight, gptq, output_error, weight_grid
from repquant_fx.quantizers.groups import Grouping, best, gptq_groups, nearest


def layer(inputs: int, outputs: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) + 0.3  # ranges that are not symmetric
    mixed = torch.randn(600, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = mixed * torch.exp(torch.randn(inputs, generator=generator))
    return weight, (2 * x.T @ x).double()


def error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    return float(output_error(weight, quantized.dequantize(), hessian).sum())


@pytest.mark.parametrize("inputs, size, groups", [(64, 16, 4), (72, 32, 3), (10, 16, 1), (48, 0, None)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_codes_fit_their_type_and_values_their_weights(inputs: int, size: int, groups: int | None, bits: int) -> None:
    weight, _ = layer(inputs)
    found = nearest(weight, Grouping(bits, size, search=False))
    assert found.scale.shape == ((24,) if groups is None else (24, groups)) and found.codes.dtype is torch.int8
    half = 1 << (bits - 1)
    if bits <= 4:  # with a zero point, in half a byte
        assert found.zero_point is not None and found.zero_point.shape == found.scale.shape
        assert -half <= int(found.codes.min()) and int(found.codes.max()) < half
        assert -half <= int(found.zero_point.min()) and int(found.zero_point.max()) < half
    else:
        assert found.zero_point is None
    step = found.scale.repeat_interleave(size, 1)[:, :inputs] if size else found.scale[:, None]
    away = (found.dequantize() - weight).abs() / step
    assert float(away.max()) <= 1.0 + 1e-5  # half a step, and half of one for the rounded zero point


def test_a_group_knows_its_own_range() -> None:
    """A group of large weights does not coarsen another one."""
    weight = torch.cat([torch.rand(4, 16) * 100, torch.rand(4, 16)], 1)
    found = nearest(weight, Grouping(4, 16))
    assert float((found.dequantize() - weight)[:, 16:].abs().max()) < 0.1
    whole = nearest(weight, Grouping(4))
    assert float((whole.dequantize() - weight)[:, 16:].abs().max()) > 0.4


@pytest.mark.parametrize("inputs, size", [(64, 16), (72, 32), (64, 0)])
def test_gptq_beats_rounding_to_nearest_and_one_scale_for_all(inputs: int, size: int) -> None:
    weight, hessian = layer(inputs)
    found = gptq_groups(weight, hessian, Grouping(4, size))
    assert error(weight, found, hessian) < 0.6 * error(weight, nearest(weight, Grouping(4, size)), hessian)
    channel = gptq(weight, hessian, weight_grid(weight, 4, symmetric=True, importance=hessian.diagonal().float()))
    assert error(weight, found, hessian) < error(weight, channel, hessian)
    assert found.group == size and bool((found.dequantize().isfinite()).all())


def test_each_row_is_no_worse_than_to_nearest() -> None:
    weight, hessian = layer(40, seed=3)
    grouping = Grouping(3, 16)
    found, plain = gptq_groups(weight, hessian, grouping), nearest(weight, grouping)
    rows = [output_error(weight, each.dequantize(), hessian) for each in (found, plain)]
    assert bool((rows[0] <= rows[1]).all())


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, hessian = layer(32)
    hessian[5], hessian[:, 5] = 0, 0
    found = gptq_groups(weight, hessian, Grouping(4, 16))
    weight[:, 5] = 0
    assert error(weight, found, hessian) < error(weight, nearest(weight, Grouping(4, 16)), hessian)


def test_without_activation_order_columns_go_as_they_stand() -> None:
    weight, hessian = layer(64)
    ordered, plain = (gptq_groups(weight, hessian, Grouping(4, 16), activation_order=order) for order in (True, False))
    assert not torch.equal(ordered.codes, plain.codes)
    assert error(weight, ordered, hessian) < error(weight, plain, hessian)


def test_the_better_of_two_is_taken_row_by_row() -> None:
    weight, hessian = layer(32)
    first, second = nearest(weight, Grouping(4, 16)), nearest(weight, Grouping(4, 16, search=False))
    rows = [output_error(weight, each.dequantize(), hessian) for each in (first, second)]
    found = output_error(weight, best(weight, hessian, [first, second]).dequantize(), hessian)
    assert torch.allclose(found, torch.minimum(*rows)) and 0 < int((rows[0] < rows[1]).sum()) < len(weight)


def test_dead_groups_stay_finite() -> None:
    weight, hessian = layer(32)
    weight[:, :16] = 0
    found = gptq_groups(weight, hessian, Grouping(4, 16))
    assert float(found.dequantize()[:, :16].abs().max()) < 1e-20 and bool(found.scale.isfinite().all())
