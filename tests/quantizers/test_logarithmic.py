"""Logarithmic quantization of probabilities: Eq. 15-17, with a code kept for exact zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx.quantizers import logarithmic as log
from repquant_fx.quantizers.observers import LogQuantizer, ShiftLogQuantizer

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-7)])
def test_the_shift_dequantizes_every_code_alike(
    bits: int, scale: float, steps: int, dtype: torch.dtype, tolerance: float
) -> None:
    codes = torch.arange(1 << bits, dtype=dtype)
    plain, shifted = log.dequantize(codes, scale, bits, steps), log.dequantize_shift(codes, scale, bits, steps)
    normal = plain >= torch.finfo(dtype).tiny  # below, float32 itself runs out of bits
    torch.testing.assert_close(shifted[normal], plain[normal], rtol=tolerance, atol=0)
    levels = [scale * 2 ** (-q / steps) for q in range((1 << bits) - 1)] + [0.0]
    expected = torch.tensor(levels, dtype=torch.float64)
    torch.testing.assert_close(shifted.double(), expected, rtol=max(tolerance, 1e-13), atol=1e-44)


@pytest.mark.parametrize("bits", BITS)
def test_the_shift_uses_two_scales_and_a_power_of_two(bits: int) -> None:
    codes = torch.arange((1 << bits) - 1, dtype=torch.float64)
    values = log.dequantize_shift(codes, 0.7, bits)
    mantissas = {math.frexp(v)[0] for v in values.tolist()}
    assert len(mantissas) == min(2, len(codes))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [1, 2])
def test_exact_zero_has_the_top_code_and_stays_zero(bits: int, steps: int) -> None:
    a = torch.tensor([0.0, 1.0, 0.5, 0.0])
    codes = log.quantize(a, 1.0, bits, steps)
    assert codes[[0, 3]].tolist() == [log.zero_code(bits)] * 2 == [(1 << bits) - 1] * 2
    assert log.fake_quantize(a, 1.0, bits, steps)[[0, 3]].tolist() == [0.0, 0.0]
    assert log.fake_quantize(a, 1.0, bits, steps)[:2].tolist() == [0.0, 1.0]
    assert log.level_table(1.0, bits, steps)[-1] == 0 and bool(
        (log.level_table(0.1, min(bits, 6), steps)[:-1] > 0).all()
    )


def test_masked_positions_do_not_leak_through_the_quantizers() -> None:
    scores = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 16).tril().bool()
    a = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    for quantizer in (LogQuantizer(0.9, 4, 2), LogQuantizer(0.9, 4, 1), ShiftLogQuantizer(0.9, 4, 2)):
        assert bool((quantizer(a)[..., ~mask] == 0).all())
        assert bool((quantizer(a)[..., mask] > 0).any())
    torch.testing.assert_close(ShiftLogQuantizer(0.9, 4, 2)(a), LogQuantizer(0.9, 4, 2)(a), rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [1, 2])
def test_values_far_below_the_smallest_level_become_zero_and_no_others(bits: int, steps: int) -> None:
    smallest = (1 << bits) - 2  # the last code that is not zero's
    offsets = torch.tensor([0.0, 0.49, 0.51, 3.0, 30.0], dtype=torch.float64)
    a = 0.8 * 2.0 ** (-(smallest + offsets) / steps)
    assert bool((a > 0).all())
    assert log.quantize(a, 0.8, bits, steps).tolist() == [smallest, smallest] + [log.zero_code(bits)] * 3
    assert (log.fake_quantize(a, 0.8, bits, steps) == 0).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [1, 2])
@settings(max_examples=40, deadline=None)
@given(scale=st.floats(1e-4, 1.0), seed=st.integers(0, 10_000))
def test_codes_follow_the_definition_away_from_ties(bits: int, steps: int, scale: float, seed: int) -> None:
    a = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).pow(4)
    exact = -steps * torch.log2(a / scale)
    expected = exact.round().clamp(0, (1 << bits) - 1)
    away = ((exact - exact.floor()) - 0.5).abs() > 1e-3
    for dtype in (torch.float64, torch.float32):
        from_values = log.quantize(a.to(dtype), scale, bits, steps).double()
        from_logarithms = log.quantize_log(a.log().to(dtype), scale, bits, steps).double()
        assert torch.equal(from_values[away], expected[away])
        assert torch.equal(from_logarithms[away], expected[away])


@pytest.mark.parametrize("steps", [1, 2])
@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-3, 1.0), a=st.floats(1e-3, 1.0))
def test_relative_error_is_at_most_half_a_step(steps: int, scale: float, a: float) -> None:
    value = float(log.fake_quantize(torch.tensor([a], dtype=torch.float64), scale, 8, steps))
    if a <= scale:
        assert abs(math.log2(value / a)) <= 0.5 / steps + 1e-9
    else:
        assert value <= scale * 2 ** (0.5 / steps)


def test_scale_candidates_cover_the_largest_value_downwards() -> None:
    for bits in BITS:
        candidates = log.scale_candidates(0.5, bits)
        assert candidates == sorted(candidates, reverse=True)
        assert candidates[0] >= min(0.5, candidates[0]) and any(c == pytest.approx(0.5) for c in candidates) == (
            bits < 8
        )
        assert candidates[-1] < 0.5 or bits == 8, "8 bits leave the zero point no room: their scale is 1"
        assert all(log.snap(c, bits) == c for c in candidates)


@given(scale=st.floats(1e-4, 1.0), bits=st.sampled_from(BITS), steps=st.sampled_from((1, 2, 4, 8)))
def test_a_snapped_scale_is_a_zero_point_of_the_logarithm(scale: float, bits: int, steps: int) -> None:
    """`s = 2^(m / steps)` and `2^b - 1 - m` fits uint8: the quantizer's codes are those of the zero point, one for one.
    """
    snapped = log.snap(scale, bits, steps)
    m = round(steps * math.log2(snapped))
    assert snapped == pytest.approx(2 ** (m / steps), rel=1e-12) and 0 <= log.zero_code(bits) - m <= 255
    assert log.snap(snapped, bits, steps) == snapped
    log_a = torch.log(torch.rand(200, generator=torch.Generator().manual_seed(bits), dtype=torch.float64))
    stored = (torch.round(log_a * steps / math.log(2)) + log.zero_code(bits) - m).clamp(0, log.zero_code(bits))
    codes = log.quantize_log(log_a, snapped, bits, steps)
    off_ties = ((log_a * steps / math.log(2)) % 1 - 0.5).abs() > 1e-9
    assert torch.equal(codes[off_ties], log.zero_code(bits) - stored[off_ties])
