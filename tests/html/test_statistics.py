"""What the page draws: summaries against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from repquant_fx import statistics
from repquant_fx.quantizers.gptq import output_error, round_to_nearest, weight_grid
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.reparameterization import reparameterize
from repquant_fx.quantizers.uniform import parameters_from_range


def sample(channels: int = 6, count: int = 500) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(channels, count, generator=g) * torch.logspace(-1, 1, channels)[:, None]
        + torch.linspace(-1, 1, channels)[:, None]
    )


def test_before_and_after_relate_by_the_reparameterization() -> None:
    """Channel j goes from x to (x + s_j r2_j) / r1_j: quantiles and bounds go the same way, and one pair of bounds is
    left.
    """
    x, bits = sample(), 4
    quantizer = UniformQuantizer(*parameters_from_range(x.amin(1), x.amax(1), bits, include_zero=False), bits)
    affine = reparameterize(*quantizer.exact, bits)
    found = statistics.channels(x, quantizer, affine)
    before, after = found["before"], found["after"]
    assert found["channels"] == list(range(6)) and found["total"] == 6
    for j in range(6):
        exact = np.quantile(x[j].double().numpy(), statistics.QUANTILES)
        np.testing.assert_allclose(before["quantiles"][j], exact, rtol=1e-4, atol=1e-6)
        moved = affine.apply(x.T.double()).T[j]
        np.testing.assert_allclose(
            after["quantiles"][j], np.quantile(moved.numpy(), statistics.QUANTILES), rtol=1e-4, atol=1e-6
        )
        assert sum(found["histograms"][j]["counts"]) == 500
    assert isinstance(after["low"], float) and isinstance(after["up"], float)
    assert before["span"] > 30 > 2 > after["span"]  # what Figs. 4 and 6 show


def test_errors_of_rounding_are_those_of_the_definition() -> None:
    g = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(5, 8, generator=g), torch.randn(200, 8, generator=g).double()
    hessian = 2 * inputs.T @ inputs
    nearest = round_to_nearest(weight, weight_grid(weight, 4, symmetric=True, search=False))
    coarse = round_to_nearest(weight, weight_grid(weight, 3, symmetric=False, search=False))
    pair = [q.dequantize() for q in (nearest, coarse)]
    lost = torch.stack([(w - weight).double().square().sum(1) for w in pair], dim=1)
    errors = torch.stack([output_error(weight, w, hessian) for w in pair], dim=1)
    found = statistics.rounding(weight, lost, errors, hessian, gptq=True)
    for name, rounded in zip(("nearest", "chosen"), pair):
        exact = (inputs @ (rounded - weight).double().T).square().sum() / (inputs @ weight.double().T).square().sum()
        assert found[name]["output"] == pytest.approx(float(exact), rel=1e-3)
        share = (rounded - weight).double().square().sum() / weight.double().square().sum()
        assert found[name]["weight"] == pytest.approx(float(share), rel=1e-3)
    assert (
        found["nearest"]["channels"] == sorted(found["nearest"]["channels"]) and len(found["chosen"]["channels"]) == 5
    )
    without = statistics.rounding(weight, lost, None, None, gptq=False)
    assert without["chosen"]["output"] is None and without["chosen"]["weight"] == found["chosen"]["weight"]


@pytest.mark.parametrize("bits, steps", [(4, 2), (3, 1), (8, 8)])
def test_levels_of_a_softmax(bits: int, steps: int) -> None:
    p = torch.softmax(3 * torch.randn(200, 16, generator=torch.Generator().manual_seed(2)), -1)
    p[0, :5] = 0
    found = statistics.probabilities(p, LogQuantizer(1.0, bits, steps))
    assert len(found["levels"]) == 2**bits - 1 and found["levels"][0] == 1
    np.testing.assert_allclose(found["levels"], [2 ** (-q / steps) for q in range(2**bits - 1)], rtol=1e-4)
    assert found["zeros"] == pytest.approx(5 / p.numel(), rel=1e-4)
    assert sum(found["values"]["counts"]) == p.numel()
    assert sum(found["logarithms"]["counts"]) + round(found["below"] * p.numel()) == p.numel() - 5


def test_at_most_so_many_channels_with_the_extremes() -> None:
    kept = statistics.spread_over(np.arange(1000.0)[::-1])
    assert len(kept) == statistics.CHANNELS and kept[0] == 0 and kept[-1] == 999 and kept == sorted(kept)


@pytest.mark.parametrize("values", [np.zeros(7), np.full(3, 5e20), np.array([1.0])])
def test_a_constant_has_a_histogram(values: np.ndarray) -> None:
    found = statistics.histogram(values, 40)
    assert found["counts"] == [len(values)] and found["high"] > found["low"]


def test_round_trip_through_a_work_directory() -> None:
    x = sample()
    quantizer = UniformQuantizer(*parameters_from_range(x.amin(1), x.amax(1), 4, include_zero=False), 4)
    one = statistics.Statistics({"a/input": statistics.channels(x, quantizer, None)}, {"linear": {"method": "GPTQ"}})
    again = statistics.Statistics.from_tensors(one.to_tensors())
    assert again == one and statistics.Statistics.from_tensors({}) is None
