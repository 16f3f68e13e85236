"""Scale reparameterization is an identity: the same codes, the same output (Eq. 10-14)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.quantizers.reparameterization import ChannelAffine, reparameterize
from repquant_fx.quantizers.uniform import dequantize, parameters_from_range, quantize

D, OUT = 24, 10


def setting(seed: int, bits: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A norm's normalised values, its affine and a Linear after it; channels off zero, scales over two decades."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    v = {"n": normal(200, D), "gamma": normal(D) * torch.exp(normal(D)), "beta": normal(D) * 3}
    v |= {"w": normal(OUT, D), "b": normal(OUT)}
    v["x"] = v["n"] * v["gamma"] + v["beta"]
    v["s"], v["z"] = parameters_from_range(v["x"].amin(0), v["x"].amax(0), bits, include_zero=False)
    return v


def away_from_ties(x: Tensor, scale: Tensor, distance: float) -> Tensor:
    q = x / scale
    return ((q - q.floor()) - 0.5).abs() > distance


def free(v: dict[str, Tensor], scale: float, zero_point: int) -> ChannelAffine:
    """The affine to arbitrary per-tensor parameters."""
    s, z = torch.tensor(scale, dtype=v["s"].dtype), torch.tensor(float(zero_point), dtype=v["s"].dtype)
    return ChannelAffine(v["s"] / s, v["s"] * (v["z"] - z), s, z)


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e2), zero_point=st.integers(-50, 300))
def test_codes_and_output_do_not_change_for_any_scale_and_zero_point(
    bits: int, seed: int, scale: float, zero_point: int
) -> None:
    v = setting(seed, bits)
    for affine in (reparameterize(v["s"], v["z"], bits), free(v, scale, zero_point)):
        gamma, beta = affine.rewrite_norm(v["gamma"], v["beta"])
        moved = v["n"] * gamma + beta
        torch.testing.assert_close(moved, affine.apply(v["x"]), rtol=1e-11, atol=1e-9 * max(1.0, scale))
        before = quantize(v["x"], v["s"], v["z"], bits, -1)
        after = quantize(moved, affine.scale, affine.zero_point, bits)
        checked = away_from_ties(v["x"], v["s"], 1e-9)
        assert torch.equal(before[checked], after[checked]) and float(checked.double().mean()) > 0.999
        weight, bias = affine.rewrite_linear(v["w"], v["b"])
        exact = v["x"] @ v["w"].T + v["b"]
        # what is added up: the shift cancels against the bias
        size = (v["x"].abs() + affine.shift.abs()) @ v["w"].abs().T + 1
        assert float(((moved @ weight.T + bias - exact).abs() / size).max()) < 1e-12
        # and the quantized layers agree as well: the codes are one and the same integers
        dequantized = dequantize(before, v["s"], v["z"], -1) @ v["w"].T + v["b"]
        reparameterized = dequantize(before, affine.scale, affine.zero_point) @ weight.T + bias
        assert float(((dequantized - reparameterized).abs() / size).max()) < 1e-12


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_identity_holds_in_float32(bits: int) -> None:
    v = setting(3, bits)
    affine = reparameterize(v["s"], v["z"], bits)
    gamma, beta = (t.float() for t in affine.rewrite_norm(v["gamma"], v["beta"]))
    weight, bias = (t.float() for t in affine.rewrite_linear(v["w"], v["b"]))
    moved = v["n"].float() * gamma + beta
    exact = v["x"] @ v["w"].T + v["b"]
    assert float((moved @ weight.T + bias - exact).norm() / exact.norm()) < 1e-5
    checked = away_from_ties(v["x"], v["s"], 1e-3)
    codes = quantize(moved, affine.scale.float(), affine.zero_point.float(), bits)
    assert torch.equal(codes.double()[checked], quantize(v["x"], v["s"], v["z"], bits, -1)[checked])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8))
def test_chosen_parameters_can_be_stored(seed: int, bits: int) -> None:
    v = setting(seed, bits)
    affine = reparameterize(v["s"], v["z"], bits)
    z = float(affine.zero_point)
    assert z == round(z) and 0 <= z < 1 << bits
    assert float(affine.scale) == pytest.approx(float(v["s"].mean())) and bool((affine.ratio > 0).all())


def test_layers_without_affine_or_bias_gain_one() -> None:
    v = setting(5, 4)
    affine = reparameterize(v["s"], v["z"], 4)
    gamma, beta = affine.rewrite_norm(None, None)
    torch.testing.assert_close(v["n"] * gamma + beta, affine.apply(v["n"]), rtol=1e-12, atol=1e-12)
    weight, bias = affine.rewrite_linear(v["w"], None)
    torch.testing.assert_close(affine.apply(v["x"]) @ weight.T + bias, v["x"] @ v["w"].T, rtol=1e-10, atol=1e-10)


def test_dead_and_one_sided_channels_stay_finite() -> None:
    v = setting(7, 4)
    v["gamma"][:4] = 0
    v["beta"][:4] = torch.tensor([0.0, 5.0, -200.0, 1e-9], dtype=torch.float64)
    v["beta"][4], v["beta"][5] = 500.0, -500.0
    x = v["n"] * v["gamma"] + v["beta"]
    s, z = parameters_from_range(x.amin(0), x.amax(0), 4, include_zero=False)
    affine = reparameterize(s, z, 4)
    gamma, beta = affine.rewrite_norm(v["gamma"], v["beta"])
    weight, bias = affine.rewrite_linear(v["w"], v["b"])
    assert all(bool(torch.isfinite(t).all()) for t in (gamma, beta, weight, bias))
    moved = v["n"] * gamma + beta
    checked = away_from_ties(x, s, 1e-6)
    after = quantize(moved, affine.scale, affine.zero_point, 4)
    assert torch.equal(after[checked], quantize(x, s, z, 4, -1)[checked])
    exact = x @ v["w"].T + v["b"]
    assert float((moved @ weight.T + bias - exact).norm() / exact.norm()) < 1e-10


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_grids_have_the_middle_zero_point_and_the_same_codes(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 3 + 1
    scale = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    zero_point = torch.randint(0, 1 << bits, (6,), generator=generator).double()
    affine = reparameterize(scale, zero_point, bits, symmetric=True)
    assert float(affine.zero_point) == 1 << (bits - 1)
    torch.testing.assert_close(quantize(affine.apply(x), affine.scale, affine.zero_point, bits),
                               quantize(x, scale, zero_point, bits, -1), rtol=0, atol=0)
