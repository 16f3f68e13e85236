"""Dual clipping: never worse than min-max, and the search at least as good as the paper's optimisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repquant_fx.quantizers.clipping import (
    _Histogram,
    clipping_error,
    learn_bounds,
    minmax_bounds,
    percentile_bounds,
    search_bounds,
)
from repquant_fx.quantizers.uniform import fake_quantize, parameters_from_range

KINDS = ["gaussian", "heavy", "outliers", "gelu", "relu", "positive", "negative", "constant"]
D, N = 6, 1500


def sample(kind: str, d: int = D, n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of very different scales and offsets."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(d, n, generator=g, dtype=torch.float64)
    scale, offset = (
        torch.logspace(-3, 2, d, dtype=torch.float64)[:, None],
        torch.linspace(-3, 3, d, dtype=torch.float64)[:, None],
    )
    if kind == "heavy":
        x = x / (torch.rand(d, n, generator=g, dtype=torch.float64) + 0.05)
    if kind == "outliers":
        x[:, :3] *= 40
    if kind == "gelu":
        x, offset = torch.nn.functional.gelu(2 * x), torch.zeros_like(offset)
    if kind == "relu":
        x, offset = x.relu(), torch.zeros_like(offset)
    if kind == "positive":
        x, offset = x.exp(), offset.abs() + 1
    if kind == "negative":
        x, offset = -x.exp(), -offset.abs() - 1
    if kind == "constant":
        x = torch.zeros_like(x)
    return ((x + offset) * scale).to(dtype)


def reference_error(x: Tensor, low: Tensor, up: Tensor, bits: int, include_zero: bool) -> Tensor:
    """The definition, channel by channel in float64."""
    rows = []
    for row, lo, hi in zip(x.double(), low, up):
        scale, zero_point = parameters_from_range(lo, hi, bits, include_zero=include_zero)
        rows.append((fake_quantize(row, scale.double(), zero_point.double(), bits) - row).square().mean())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("include_zero", [False, True])
def test_no_channel_is_worse_than_at_its_extremes(kind: str, bits: int, include_zero: bool) -> None:
    x = sample(kind)
    start = minmax_bounds(x, bits, include_zero=include_zero)
    assert torch.equal(start.low, x.amin(1)) and torch.equal(start.up, x.amax(1))
    learned = learn_bounds(x, bits, include_zero=include_zero, iterations=20)
    for bounds in (search_bounds(x, bits, include_zero=include_zero), learned):
        for values in (bounds.low, bounds.up, bounds.error):
            assert values.shape == (D,) and bool(torch.isfinite(values).all())
        assert bool((bounds.error <= start.error).all())
        # the error reported is the error at the bounds returned
        torch.testing.assert_close(
            clipping_error(x, bounds.low, bounds.up, bits, include_zero=include_zero), bounds.error
        )
        assert bool(
            (bounds.low >= start.low).all() and (bounds.up <= start.up).all() and (bounds.low <= bounds.up).all()
        )


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "constant"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("include_zero", [False, True])
def test_the_error_from_histograms_is_near(kind: str, bits: int, include_zero: bool) -> None:
    x = sample(kind, dtype=torch.float64)
    data = _Histogram(x, 4096)
    low, up = x.quantile(0.01, dim=1), x.quantile(0.995, dim=1)
    candidates = [(x.amin(1), x.amax(1)), (low, up), (low, x.amax(1)), (2 * low - up, up)]
    got = data.errors(*(torch.stack(c, dim=1) for c in zip(*candidates)), bits, include_zero)
    for k, (lo, hi) in enumerate(candidates):
        torch.testing.assert_close(
            got[:, k], reference_error(x, lo, hi, bits, include_zero), rtol=0.1 if bits == 8 else 0.02, atol=0
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_from_histograms_is_exact_where_thresholds_are_edges(bits: int) -> None:
    """More bins bring it as near as one likes: the values themselves are counted and summed, nothing is rounded to a
    bin.
    """
    x = sample("heavy", dtype=torch.float64)
    low, up = x.quantile(0.02, dim=1), x.quantile(0.98, dim=1)
    exact = reference_error(x, low, up, bits, False)
    gaps = []
    for bins in (256, 4096, 1 << 16):
        got = _Histogram(x, bins).errors(low[:, None], up[:, None], bits, False)[:, 0]
        gaps.append(float((got / exact - 1).abs().max()))
    assert gaps[2] < 1e-3 and gaps[2] < gaps[1] < gaps[0]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "constant"])
def test_the_median_to_a_bin(kind: str) -> None:
    x = sample(kind)
    data, median = _Histogram(x, 4096), x.median(1, keepdim=True).values
    assert bool(
        (
            (data.median - median).abs()
            <= 0.02 * (x.quantile(0.75, dim=1, keepdim=True) - x.quantile(0.25, dim=1, keepdim=True))
            + 1e-6 * x.abs().amax()
        ).all()
    )


@pytest.mark.parametrize("far", [1e2, 1e4, 1e6])
def test_an_outlier_costs_the_others_no_resolution(far: float) -> None:
    """The bounds found beside two outliers are no worse than those found by a scan over the exact error."""
    x = torch.randn(8, 3000, generator=torch.Generator().manual_seed(3))
    x[:, :2] *= far
    t = torch.cat([torch.linspace(0, 0.98, 50), 1 - torch.logspace(-7, -2, 30)])
    median = x.median(1).values
    scan = torch.stack(
        [
            clipping_error(x, torch.lerp(x.amin(1), median, w), torch.lerp(x.amax(1), median, w), 4)
            for w in t.clamp(max=0.98)
        ]
    )
    assert float((search_bounds(x, 4).error / scan.amin(0)).median()) <= 1.01


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outliers", "gelu", "positive", "negative"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_search_reaches_the_error_of_the_learned_bounds(kind: str, bits: int) -> None:
    x = sample(kind)
    ratio = search_bounds(x, bits).error / learn_bounds(x, bits).error
    assert float(ratio.mean()) < 1
    assert float(ratio.max()) <= (1.01 if kind in ("gaussian", "heavy") else 1.06)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_is_near_the_best_of_a_dense_grid(bits: int) -> None:
    x = sample("outliers", n=400, dtype=torch.float64)
    low, up, median = x.amin(1, keepdim=True), x.amax(1, keepdim=True), x.median(1, keepdim=True).values
    t = torch.linspace(0, 0.99, 80, dtype=x.dtype)
    a, b = torch.meshgrid(t, t, indexing="ij")
    pairs = zip(a.reshape(-1), b.reshape(-1))
    errors = torch.stack(
        [
            clipping_error(x, *(torch.lerp(end, median, w)[:, 0] for end, w in ((low, p), (up, q))), bits)
            for p, q in pairs
        ],
        dim=1,
    )
    assert bool((search_bounds(x, bits).error <= 1.05 * errors.amin(1)).all())


def test_clipping_pays_on_outliers() -> None:
    x = sample("outliers")
    start = minmax_bounds(x, 4)
    assert float((search_bounds(x, 4).error / start.error).mean()) < 0.6
    assert float((learn_bounds(x, 4).error / start.error).mean()) < 0.97


@pytest.mark.parametrize("factor", [2.0**-14, 2.0**10])
def test_bounds_scale_with_the_data(factor: float) -> None:
    x = sample("heavy", dtype=torch.float64)[3:] / 10
    for method in (search_bounds, learn_bounds):
        plain, scaled = method(x, 4), method(x * factor, 4)
        torch.testing.assert_close(scaled.up, plain.up * factor, rtol=1e-4, atol=0)
        torch.testing.assert_close(scaled.low, plain.low * factor, rtol=1e-4, atol=0)


def test_channels_are_searched_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever chunks, and whatever the other channels hold."""
    x = sample("heavy")
    whole = search_bounds(x, 4)
    monkeypatch.setattr("repquant_fx.quantizers.clipping.CHUNK", 1)
    chunked = search_bounds(x, 4)
    # alternation ends when no channel of a chunk gains any more, so a channel may stop a turn earlier alone
    torch.testing.assert_close(chunked.error, whole.error, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", [search_bounds, learn_bounds, minmax_bounds])
def test_a_single_value_a_channel(method) -> None:  # type: ignore[no-untyped-def]
    bounds = method(torch.tensor([[2.0], [0.0], [-7.0]]), 4)
    assert bool(torch.isfinite(bounds.error).all()) and float(bounds.error.max()) < 1e-6


def test_learning_starts_at_the_products_of_the_paper_and_moves_them() -> None:
    """One iteration keeps `extreme * sigmoid(4)` where that is better than the extreme."""
    x = sample("outliers")[-1:]
    first = learn_bounds(x, 4, iterations=1)
    torch.testing.assert_close(first.up, x.amax(1) * torch.sigmoid(torch.tensor(4.0)))
    torch.testing.assert_close(first.low, x.amin(1) * torch.sigmoid(torch.tensor(4.0)))
    assert float(learn_bounds(x, 4, iterations=100).error) < float(first.error) < float(minmax_bounds(x, 4).error)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_learning_clips_a_channel_far_from_zero(sign: float) -> None:
    """The plain product `max * sigmoid(a)` would put the upper bound below the minimum."""
    x = sign * (100 + sample("outliers", dtype=torch.float64)[2:3])
    learned, start = learn_bounds(x, 3), minmax_bounds(x, 3)
    assert bool((learned.low > start.low).all() and (learned.up < start.up).all())
    assert float(learned.error) < 0.97 * float(start.error)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_bounds_are_the_quantiles(percentile: float) -> None:
    x = sample("gaussian", n=2001)
    bounds = percentile_bounds(x, 4, percentile)
    torch.testing.assert_close(bounds.up, x.quantile(percentile / 100, dim=1, interpolation="nearest"))
    torch.testing.assert_close(bounds.low, x.quantile(1 - percentile / 100, dim=1, interpolation="nearest"))
    assert torch.equal(bounds.error, clipping_error(x, bounds.low, bounds.up, 4))
