"""GPTQ against a column-by-column reference and against rounding to nearest on the same grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.errors import CalibrationError, PassError
from repquant_fx.quantizers.gptq import WeightGrid, gptq, inverse_factor, output_error, round_to_nearest, weight_grid
from repquant_fx.quantizers.weight import chosen_grid
from repquant_fx.recipe import Recipe

BITS = range(2, 9)


def inputs(kind: str, n: int, tokens: int = 400, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64)
    if kind == "correlated":
        x = x @ torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
        x += 2 * torch.randn(tokens, 1, generator=g, dtype=torch.float64)
    if kind == "singular":
        x = x[: n // 3]
    if kind == "dead":
        x[:, ::4] = 0
    if kind == "uneven":
        x = x * torch.logspace(-3, 3, n, dtype=torch.float64)
    return x


def hessian_of(x: Tensor) -> Tensor:
    return 2 * (x.T @ x)


def weights(rows: int, n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, damping: float, activation_order: bool
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, one column at a time, with the inverse of the remaining inputs' Hessian computed anew each
    time.

    Returns codes, and how far each value stood from a rounding tie, in steps.
    """
    w = weight.double().clone()
    n = w.shape[1]
    h = hessian.clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h[dead, dead] = 1
    h += damping * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    order = sorted(range(n), key=lambda j: -float(hessian[j, j])) if activation_order else list(range(n))
    codes, distance = torch.zeros_like(w), torch.ones_like(w)
    for position, j in enumerate(order):
        remaining = order[position:]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        exact = w[:, j] / grid.scale.double()
        distance[:, j] = ((exact - exact.floor()) - 0.5).abs()
        codes[:, j] = grid.codes(w[:, j].clone())
        error = (w[:, j] - codes[:, j] * grid.scale.double()) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0][None]
    return codes, distance


@pytest.mark.parametrize("kind", ["random", "correlated", "dead", "singular", "uneven"])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("block", [1, 7, 24, 128])
def test_codes_equal_the_references(kind: str, activation_order: bool, block: int) -> None:
    w, h = weights(12, 24, dtype=torch.float64), hessian_of(inputs(kind, 24))
    grid = weight_grid(w, 4, symmetric=True)
    expected, distance = reference(w, h, grid, 0.01, activation_order)
    got = gptq(w, h, grid, damping=0.01, block=block, activation_order=activation_order).codes.double()
    # rows in which no value came near a tie: a tie may fall either way and the rest of its row follows it
    rows = (distance > 1e-6).all(dim=1)
    # and rows that GPTQ did not hand back to rounding because that was better
    nearest = grid.codes(torch.where(h.diagonal() > 0, w, torch.zeros_like(w)))
    scale = grid.scale[:, None]
    rows &= output_error(w, expected * scale, h) <= output_error(w, nearest * scale, h)
    assert int(rows.sum()) >= 6
    assert torch.equal(got[rows], expected[rows])


@pytest.mark.parametrize("kind", ["random", "correlated", "dead", "singular", "uneven"])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_row_is_worse_than_rounding(kind: str, activation_order: bool, block: int, bits: int) -> None:
    x = inputs(kind, 48)
    w, h = weights(20, 48), hessian_of(x)
    grid = weight_grid(w, bits, symmetric=True)
    quantized = gptq(w, h, grid, block=block, activation_order=activation_order)
    ours = output_error(w, quantized.dequantize(), h)
    rounded = output_error(w, round_to_nearest(w, grid).dequantize(), h)
    assert bool((ours <= rounded * (1 + 1e-6) + 1e-9).all())
    # the error is what the layer's output loses
    direct = (x @ (quantized.dequantize() - w).double().T).square().sum(0)
    torch.testing.assert_close(ours, direct, rtol=1e-9, atol=1e-9)
    if kind == "correlated":
        assert float(ours.sum()) < 0.6 * float(rounded.sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 5), st.integers(1, 40), st.integers(2, 8))
def test_codes_stay_on_the_grid_for_any_problem(seed: int, n: int, rows: int, tokens: int, bits: int) -> None:
    w, h = weights(rows, n, seed), hessian_of(inputs("random", n, tokens, seed))
    for symmetric in (True, False) if bits < 8 else (True,):
        grid = weight_grid(w, bits, symmetric=symmetric)
        quantized = gptq(w, h, grid, block=4)
        codes = quantized.codes
        assert codes.dtype == torch.int8
        assert bool((codes >= grid.low[:, None]).all() and (codes <= grid.high[:, None]).all())
        ours, rounded = (output_error(w, q.dequantize(), h) for q in (quantized, round_to_nearest(w, grid)))
        assert bool((ours <= rounded * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_hold_the_promised_codes(bits: int, symmetric: bool) -> None:
    w = torch.cat([weights(8, 40), weights(4, 40).abs(), -weights(4, 40).abs(), torch.zeros(1, 40)])
    if bits == 8 and not symmetric:
        with pytest.raises(PassError, match="int8"):
            weight_grid(w, bits, symmetric=False)
        return
    for search in (False, True):
        grid = weight_grid(w, bits, symmetric=symmetric, search=search)
        quantized = round_to_nearest(w, grid)
        # codes survive int8, and dequantize to exactly what the grid rounds to
        assert torch.equal(quantized.codes.float(), grid.codes(w))
        assert torch.equal(quantized.dequantize(), grid.values(w))
        half = 1 << (bits - 1)
        if symmetric:
            low, high = (-127, 127) if bits == 8 else (-half, half - 1)
            assert bool((grid.low == low).all() and (grid.high == high).all())
        else:
            assert bool(
                (grid.high - grid.low == 2**bits - 1).all() and (grid.low <= 0).all() and (grid.high >= 0).all()
            )
            assert float(grid.low.min()) >= -128 and float(grid.high.max()) <= 127
        assert bool(torch.isfinite(grid.scale).all() and (grid.scale > 0).all())
        assert bool((quantized.codes[-1] == 0).all())  # a row of zeros


@pytest.mark.parametrize("bits", BITS)
def test_the_grid_search_never_raises_the_error(bits: int) -> None:
    w = weights(30, 64)
    w[:, 0] *= 6
    for symmetric in (True, False) if bits < 8 else (True,):
        plain, searched = (weight_grid(w, bits, symmetric=symmetric, search=s) for s in (False, True))
        before, after = ((g.values(w) - w).square().sum(1) for g in (plain, searched))
        assert bool((after <= before).all())
        if bits <= 4:
            assert float(after.sum()) < 0.95 * float(before.sum())
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0))
    weighted = weight_grid(w, bits, symmetric=True, importance=importance)
    errors = [
        ((g.values(w) - w).square() * importance).sum(1) for g in (weighted, weight_grid(w, bits, symmetric=True))
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_dead_inputs_get_weight_zero() -> None:
    w, h = weights(10, 32), hessian_of(inputs("dead", 32))
    grid = weight_grid(w, 4, symmetric=False)
    for activation_order in (False, True):
        codes = gptq(w, h, grid, activation_order=activation_order).codes
        assert bool((codes[:, ::4] == 0).all()) and bool((codes[:, 1] != 0).any())
    nothing = gptq(w, torch.zeros(32, 32, dtype=torch.float64), grid).codes
    assert bool((nothing == 0).all())


def test_a_diagonal_hessian_leaves_nothing_to_compensate() -> None:
    w = weights(10, 32)
    grid = weight_grid(w, 3, symmetric=True)
    h = torch.diag(torch.linspace(1, 9, 32, dtype=torch.float64))
    assert torch.equal(gptq(w, h, grid).codes, round_to_nearest(w, grid).codes)


def test_rows_do_not_interact() -> None:
    """What lets Linears that share an input share one sweep."""
    w, h = weights(9, 40), hessian_of(inputs("correlated", 40))
    grid = weight_grid(w, 4, symmetric=True)
    whole = gptq(w, h, grid)
    parts = [
        gptq(w[r], h, WeightGrid(grid.scale[r], grid.low[r], grid.high[r])).codes for r in (slice(0, 4), slice(4, 9))
    ]
    assert torch.equal(whole.codes, torch.cat(parts))


@pytest.mark.parametrize("kind", ["random", "correlated", "singular", "dead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_is_upper_and_gives_the_damped_inverse(kind: str, dtype: torch.dtype) -> None:
    h = hessian_of(inputs(kind, 30)).to(dtype)
    upper, dead = inverse_factor(h, 0.01)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    assert dead.tolist() == [kind == "dead" and j % 4 == 0 for j in range(30)]
    damped = h.double().clone()
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    product = upper.double().T @ upper.double() @ damped
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(product, torch.eye(30, dtype=torch.float64), rtol=0, atol=tolerance)


def test_damping_is_raised_until_the_factorisation_succeeds() -> None:
    x = inputs("random", 12, tokens=3)
    upper, _ = inverse_factor(hessian_of(x), 0.0)
    assert bool(torch.isfinite(upper).all())
    indefinite = torch.eye(6, dtype=torch.float64) - 0.5 * torch.ones(6, 6, dtype=torch.float64)
    assert bool(torch.isfinite(inverse_factor(indefinite, 0.01)[0]).all())  # smallest eigenvalue -2, mean diagonal 0.5
    hopeless = torch.full((6, 6), 100.0, dtype=torch.float64).fill_diagonal_(1)
    with pytest.raises(CalibrationError, match=r"blocks\.3.*cannot be factorised"):
        inverse_factor(hopeless, 0.01, "blocks.3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite_is_a_clear_error(value: float) -> None:
    w, h = weights(4, 8), hessian_of(inputs("random", 8))
    h[2, 5] = value
    with pytest.raises(CalibrationError, match=r"Hessian of blocks\.0\.fc1 is not finite"):
        gptq(w, h, weight_grid(w, 4, symmetric=True), where="blocks.0.fc1")


def test_bits_and_recipe_choose_the_grid() -> None:
    """Containers that are full have no room for a zero point; a min-max range is not searched."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    for bits in (3, 4, 6, 8):
        grid = chosen_grid(weight, bits, Recipe(weights="minmax"))
        assert torch.equal(grid.scale, weight_grid(weight, bits, symmetric=bits in (4, 8), search=False).scale)
        searched = chosen_grid(weight, bits, Recipe())
        assert bool((searched.scale <= grid.scale).all()) and (bits > 4 or bool((searched.scale < grid.scale).any()))
