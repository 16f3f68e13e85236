"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx.sensitivity import knapsack as module
from repquant_fx.sensitivity.knapsack import Knapsack

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50).map(lambda i: i / 7)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def _best(items: list, budget: int) -> float:
    return min(
        (sum(d for _, d in pick) for pick in itertools.product(*items) if sum(c for c, _ in pick) <= budget),
        default=math.inf,
    )


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(0, 40), st.sampled_from([1, 3, 1000]))
def test_no_choice_is_better(items: list, budget: int, unit: int) -> None:
    items = [[(c * unit, d) for c, d in item] for item in items]
    budget = budget * unit + unit // 2
    solver = Knapsack([[c for c, _ in item] for item in items], [[d for _, d in item] for item in items])
    found = solver.solve(budget)
    assert solver.damage(budget) == pytest.approx(_best(items, budget))
    if found is None:
        assert math.isinf(_best(items, budget))
        return
    assert sum(item[i][0] for item, i in zip(items, found)) <= budget
    assert sum(item[i][1] for item, i in zip(items, found)) == pytest.approx(_best(items, budget))


@settings(max_examples=40, deadline=None)
@given(ITEMS, st.integers(0, 40))
def test_coarse_cells_stay_within_the_budget(items: list, budget: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CELLS", 5)
        solver = Knapsack([[c for c, _ in item] for item in items], [[d for _, d in item] for item in items])
    found = solver.solve(budget)
    if found is not None:
        assert sum(item[i][0] for item, i in zip(items, found)) <= budget
    assert (found is None) == (budget < sum(min(c for c, _ in item) for item in items))


def test_budget_for_a_damage() -> None:
    solver = Knapsack([[10, 20], [10, 40]], [[4.0, 1.0], [4.0, 0.0]])
    assert solver.budget_for(5.0) == 30 and solver.budget_for(1.0) == 60 and solver.budget_for(8.0) == 20
    assert solver.budget_for(0.5) == solver.most  # out of reach: as much as helps
    assert solver.solve(30) == [1, 0] and solver.solve(59) == [0, 1] and solver.solve(19) is None
