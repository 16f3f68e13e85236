"""Observers and the quantizers that take their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repquant_fx.errors import PassError
from repquant_fx.quantizers import uniform
from repquant_fx.quantizers.clipping import percentile_bounds
from repquant_fx.quantizers.observers import LogQuantizer, Observer, Passthrough, UniformQuantizer


def data(n: int = 600, channels: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, channels, generator=g) * torch.logspace(-1, 1, channels)


def observed(observer: Observer, batches: list[Tensor]) -> Observer:
    observer.start(len(batches))
    for batch in batches:
        assert torch.equal(observer(batch), batch)  # returns its input unchanged
    return observer


def rows_in_order(sample: Tensor) -> Tensor:
    return sample.sort(dim=1).values


@pytest.mark.parametrize("channels", [True, False])
def test_streaming_equals_one_shot_within_capacity(channels: bool) -> None:
    x = data()
    capacity = len(x) * 4 if channels else x.numel()
    once = observed(Observer(channels, capacity), [x]).sample()
    streamed = observed(Observer(channels, capacity), list(x.split(150))).sample()
    assert once.shape == (5 if channels else 1, (capacity if channels else x.numel()) + 2)
    assert torch.equal(rows_in_order(once), rows_in_order(streamed))
    everything = x.reshape(-1, 5).T if channels else x.reshape(1, -1)
    assert torch.equal(once[:, :-2], everything)


@pytest.mark.parametrize("channels", [True, False])
def test_extremes_are_exact_and_memory_bounded_beyond_capacity(channels: bool) -> None:
    x = data()
    sample = observed(Observer(channels, 100), list(x.split(50))).sample()
    # 12 batches share 100: 9 each, rounded up; and the extremes
    assert sample.shape == (5 if channels else 1, 12 * 9 + 2)
    everything = x.reshape(-1, 5) if channels else x.reshape(-1, 1)
    assert torch.equal(sample.amin(1), everything.amin(0)) and torch.equal(sample.amax(1), everything.amax(0))
    for row, column in zip(sample, everything.T):
        assert bool(torch.isin(row, column).all())  # values of the data, of the channel they are filed under


@pytest.mark.parametrize("percentile", [90.0, 99.0])
def test_percentiles_of_the_sample_are_near_the_exact_ones(percentile: float) -> None:
    x = torch.randn(200, 1000, generator=torch.Generator().manual_seed(3))
    sample = observed(Observer(False, 20_000), list(x.split(20))).sample()
    assert sample.shape[1] < x.numel() / 8
    got = percentile_bounds(sample, 8, percentile)
    exact = percentile_bounds(x.reshape(1, -1), 8, percentile)
    # the share of the data below the estimate, not the value: sampling error is at most a few sqrt(p (1 - p) / n)
    p = percentile / 100
    tolerance = 5 * (p * (1 - p) / 20_000) ** 0.5
    assert float((x <= got.up).float().mean()) == pytest.approx(p, abs=tolerance)
    assert float((x < got.low).float().mean()) == pytest.approx(1 - p, abs=tolerance)
    torch.testing.assert_close(got.up, exact.up, rtol=0.05, atol=0)


def test_observers_are_repeatable_and_silent_until_started() -> None:
    x = data()
    a, b = (observed(Observer(True, 64), [x]).sample() for _ in range(2))
    assert torch.equal(a, b)
    idle = Observer(True, 64)
    idle(x)
    with pytest.raises(PassError, match="no data"):
        idle.sample()


def test_leading_slices_are_kept_whole() -> None:
    x = data()
    observer = observed(Observer(False, 64, leading=2), list(x.split(200)))
    assert torch.equal(observer.whole(), torch.cat([x[0:2], x[200:202], x[400:402]]))


def test_a_sample_is_a_copy() -> None:
    x = data()
    kept = x.clone()
    observer = observed(Observer(True, x.numel(), leading=1), [x])
    x.zero_()
    assert torch.equal(observer.sample()[:, :-2].T, kept.reshape(-1, 5)) and torch.equal(observer.whole(), kept[:1])


@pytest.mark.parametrize("per_channel", [False, True])
def test_uniform_quantizer_quantizes_the_last_axis(per_channel: bool) -> None:
    x = data()
    low, up = (x.amin((0, 1)), x.amax((0, 1))) if per_channel else (x.amin(), x.amax())
    scale, zero_point = uniform.parameters_from_range(low.double(), up.double(), 4, include_zero=False)
    quantizer = UniformQuantizer(scale, zero_point, 4)
    assert quantizer.scale.dtype == quantizer.zero_point.dtype == torch.float32
    assert torch.equal(quantizer.exact[0], scale) and set(quantizer.state_dict()) == {"scale", "zero_point"}
    codes = quantizer.codes(x)
    assert float(codes.min()) == 0 and float(codes.max()) == 15 and torch.equal(codes, codes.round())
    assert torch.equal(quantizer(x), (codes - quantizer.zero_point) * quantizer.scale)
    assert bool(((quantizer(x) - x).abs() <= quantizer.scale * 1.001).all())


def test_quantizers_swap_for_an_observer() -> None:
    x = data().softmax(-1)
    for module in (UniformQuantizer(torch.tensor(0.1), torch.tensor(0.0), 4), LogQuantizer(1.0, 4, 2), Passthrough()):
        assert module(x).shape == x.shape and module(x).dtype == x.dtype
    assert torch.equal(Passthrough()(x), x)


def test_only_what_counts_is_recorded() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    counts = {0: torch.tensor([[True, False, True], [True, True, False]])[..., None], 1: torch.zeros(2, 3, 1).bool()}
    for channels, expected in ((True, x[counts[0][..., 0]].T), (False, x[counts[0][..., 0]].reshape(1, -1))):
        observer = Observer(channels, 1000, leading=2)
        observer.start(3, counts=counts.get)
        observer(x)
        observer(x + 1000)  # nothing counts
        sample = observer.sample()
        assert torch.equal(sample[:, :-2], expected)
        assert torch.equal(sample[:, -2], expected.amin(1)) and torch.equal(sample[:, -1], expected.amax(1))
        assert torch.equal(observer.whole()[:2], x * counts[0]) and not observer.whole()[2:].any()
        observer(x + 2000)  # all does
        assert observer.sample().max() == 2023
