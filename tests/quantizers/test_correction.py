"""The least-squares correction: what is fitted, and which ridge is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repquant_fx.quantizers.correction import RIDGES, STRENGTH, Moments, fit

INPUTS, OUTPUTS = 6, 4
EYE = torch.eye(INPUTS, dtype=torch.float64)
Half = tuple[Tensor, Tensor]


def _half(count: int, seed: int, lacking: float = 1.0, noise: float = 0.0) -> Half:
    """Inputs that are correlated and away from zero, and what the layer lacks: a share of `_needed`, and noise."""
    generator = torch.Generator().manual_seed(seed)
    mixed = EYE.float() + 0.3 * torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, INPUTS, generator=generator) @ mixed + 3
    return x, lacking * x @ _needed().T + noise * torch.randn(count, OUTPUTS, generator=generator) + 5


def _needed() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(9))


def _moments(x: Tensor, *residuals: Tensor) -> Moments:
    moments = Moments(x.shape[1], [r.shape[1] for r in residuals])
    for part in zip(x.split(50), *(r.split(50) for r in residuals)):
        moments.add(part[0], part[1:])
    return moments


def _fitted(*halves: Half) -> Tensor:
    (delta,) = fit(*(_moments(x, r) for x, r in halves))
    return delta


def test_half_of_what_both_halves_lack_is_added() -> None:
    """The mean is the bias's part."""
    found = _fitted(_half(200, 1), _half(200, 2))
    torch.testing.assert_close(found.float(), STRENGTH * _needed(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lacking", [0.0, -0.5])
def test_what_does_not_help_the_other_half_is_not_added(lacking: float) -> None:
    assert _fitted(_half(400, 1), _half(400, 2, 0.5)).any()
    assert not _fitted(_half(400, 1), _half(400, 2, lacking)).any()


def test_layers_of_one_input_are_judged_apart() -> None:
    moments = [
        _moments(x, r, (2.0 * sign) * r[:, :2]) for (x, r), sign in ((_half(200, 1), 1), (_half(200, 2), -1))
    ]
    first, second = fit(*moments)
    assert first.any() and not second.any()
    assert first.shape == (OUTPUTS, INPUTS) and second.shape == (2, INPUTS)


def _ridge(x: Tensor, r: Tensor, ridge: float) -> Tensor:
    """By the samples themselves."""
    y = x.double() - x.double().mean(0)
    covariance = y.T @ y / len(y)
    damped = covariance + ridge * covariance.diagonal().mean() * EYE
    return torch.linalg.solve(damped, y.T @ (r.double() - r.double().mean(0)) / len(y)).T


def test_the_ridge_is_the_best_on_data_that_was_not_fitted() -> None:
    """Against trying each on the other half's samples."""
    chosen = set()
    for seed, noise in enumerate((0.1, 2.0, 6.0, 12.0)):
        halves = [_half(30, 10 * seed + i, noise=noise) for i in (1, 2)]
        errors = dict.fromkeys(RIDGES, 0.0)
        for (x, r), (other, rest) in (halves, halves[::-1]):
            other, rest = other.double() - other.double().mean(0), rest.double() - rest.double().mean(0)
            for ridge in RIDGES:
                errors[ridge] += float((rest - other @ _ridge(x, r, ridge).T).square().mean())
        best = min(errors, key=errors.__getitem__)
        chosen.add(best)
        x, r = (torch.cat(parts) for parts in zip(*halves))
        torch.testing.assert_close(_fitted(*halves), STRENGTH * _ridge(x, r, best), rtol=1e-3, atol=1e-4)
    assert len(chosen) > 1


def test_without_a_second_half_nothing_is_added() -> None:
    (found,) = fit(_moments(*_half(50, 1)), Moments(INPUTS, [OUTPUTS]))
    assert found.shape == (OUTPUTS, INPUTS) and not found.any()


def test_products_beyond_float32_are_summed_in_float64() -> None:
    x, r = _half(100, 1)
    small, large = _moments(x, r), _moments(x * 2.0**70, r * 2.0**70)
    torch.testing.assert_close(large.xx * 2.0**-140, small.xx)
    torch.testing.assert_close(large.rx[0] * 2.0**-140, small.rx[0])
