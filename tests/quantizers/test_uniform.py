"""Uniform affine quantization against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx.quantizers.uniform import (
    dequantize,
    fake_quantize,
    levels,
    parameters_from_range,
    quantize,
)

BITS = range(2, 9)
finite = st.floats(-1e4, 1e4, allow_nan=False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("include_zero", [False, True])
@settings(max_examples=20, deadline=None)
@given(a=finite, b=finite)
def test_error_is_at_most_one_step_and_half_a_step_away_from_the_ends(
    bits: int, include_zero: bool, a: float, b: float
) -> None:
    low, up = torch.tensor(min(a, b), dtype=torch.float64), torch.tensor(max(a, b), dtype=torch.float64)
    scale, zero_point = parameters_from_range(low, up, bits, include_zero=include_zero)
    assert float(scale) > 0 and float(zero_point) == round(float(zero_point))
    x = torch.linspace(0, 1, 501, dtype=torch.float64) * (up - low) + low
    error = (fake_quantize(x, scale, zero_point, bits) - x).abs()
    # rounding the zero point moves the levels by up to half a step against the range: only there values saturate
    first, last = dequantize(torch.tensor([0.0, levels(bits) - 1.0], dtype=torch.float64), scale, zero_point)
    inside = (x >= first - scale / 2) & (x <= last + scale / 2)
    slack = 1e-9 * float(scale)
    assert bool((error[inside] <= scale / 2 + slack).all())
    assert bool((error <= scale + slack).all())


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step_when_the_zero_point_is_exact(bits: int) -> None:
    scale, zero_point = (
        torch.tensor(0.25, dtype=torch.float64),
        torch.tensor(float(levels(bits) // 3), dtype=torch.float64),
    )
    low, up = -scale * zero_point, scale * (levels(bits) - 1 - zero_point)
    assert torch.stack(parameters_from_range(low, up, bits, include_zero=True)).tolist() == [0.25, float(zero_point)]
    x = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (up - low) + low
    error = (fake_quantize(x, scale, zero_point, bits) - x).abs()
    assert float(error.max()) <= 0.125
    assert float(error.max()) > 0.12  # and the bound is reached, so the step is not finer than claimed


def test_rounds_half_to_even() -> None:
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = quantize(x, torch.tensor(1.0), torch.tensor(8.0), 4)
    assert (codes - 8).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_divides_by_the_scale_rather_than_multiply_by_its_reciprocal() -> None:
    """The two differ on values near a tie; ONNX QuantizeLinear divides."""
    scale = torch.linspace(0.05, 3, 60)
    x = (torch.arange(250) + 0.5)[:, None] * scale
    expected = torch.round(x / scale).clamp(0, 255)
    assert torch.equal(quantize(x, scale, torch.zeros(60), 8, -1), expected)
    assert not torch.equal(torch.round(x * (1 / scale)).clamp(0, 255), expected)  # so the test can tell


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-6, 1e3), zero_point=st.integers(-300, 500), seed=st.integers(0, 1000))
def test_codes_are_integers_in_range_and_stable(bits: int, scale: float, zero_point: int, seed: int) -> None:
    s, z = torch.tensor(scale, dtype=torch.float64), torch.tensor(float(zero_point), dtype=torch.float64)
    x = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale * 300
    codes = quantize(torch.cat([x, torch.tensor([-1e30, 1e30, 0.0], dtype=torch.float64)]), s, z, bits)
    assert bool((codes == codes.round()).all()) and float(codes.min()) == 0 and float(codes.max()) == levels(bits) - 1
    assert torch.equal(quantize(dequantize(codes, s, z), s, z, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-12, -3e4, 7.25])
@pytest.mark.parametrize("include_zero", [False, True])
def test_dead_channel_is_finite_and_keeps_its_value(
    bits: int, dtype: torch.dtype, value: float, include_zero: bool
) -> None:
    x = torch.full((3,), value, dtype=dtype)
    scale, zero_point = parameters_from_range(x[0], x[0], bits, include_zero=include_zero)
    result = fake_quantize(x, scale, zero_point, bits)
    assert bool(torch.isfinite(torch.stack([scale, zero_point, result[0]])).all()) and float(scale) > 0
    assert float((result - x).abs().max()) <= max(1e-4 * abs(value), 1e-8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "up"), [(3.0, 5.0), (-9.0, -8.5), (100.0, 101.0)])
def test_a_range_on_one_side_of_zero(bits: int, low: float, up: float) -> None:
    lo, hi = torch.tensor(low, dtype=torch.float64), torch.tensor(up, dtype=torch.float64)
    x = torch.linspace(low, up, 200, dtype=torch.float64)
    scale, zero_point = parameters_from_range(lo, hi, bits, include_zero=False)
    assert not 0 <= float(zero_point) < levels(bits)  # the range is covered without widening it to zero
    assert float(scale) == pytest.approx((up - low) / (levels(bits) - 1))
    assert float((fake_quantize(x, scale, zero_point, bits) - x).abs().max()) <= float(scale)
    scale, zero_point = parameters_from_range(lo, hi, bits, include_zero=True)
    assert 0 <= float(zero_point) < levels(bits)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(fake_quantize(zero, scale, zero_point, bits)) == 0


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_no_finer_than_makes_sense_and_a_constant_lies_in_the_middle_of_one(bits: int) -> None:
    low = torch.tensor([3.0, -3.7, 0.01, 0.0, 1.0], dtype=torch.float64)
    up, finest = low + torch.tensor([0, 0, 0, 0, 1000.0]), torch.full_like(low, 0.05)
    scale, zero_point = parameters_from_range(low, up, bits, include_zero=False, finest=finest)
    assert bool((scale[:4] >= 0.05).all()) and bool((scale[:4] < 0.06).all())
    plain = parameters_from_range(low, up, bits, include_zero=False)
    assert scale[4] == plain[0][4] and zero_point[4] == plain[1][4]  # wide ranges are left as they are
    middle = (low / scale)[:2]
    assert torch.allclose(middle, middle.round(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_parameters_apply_along_their_axis(axis: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    d = x.shape[axis]
    scale = torch.rand(d, dtype=torch.float64, generator=generator) + 0.1
    zero_point = torch.arange(d, dtype=torch.float64)
    codes, values = quantize(x, scale, zero_point, 4, axis), fake_quantize(x, scale, zero_point, 4, axis)
    for c in range(d):
        assert torch.equal(codes.select(axis, c), quantize(x.select(axis, c), scale[c], zero_point[c], 4))
        assert torch.equal(values.select(axis, c), fake_quantize(x.select(axis, c), scale[c], zero_point[c], 4))
