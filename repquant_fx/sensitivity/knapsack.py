"""The multiple-choice knapsack: one option an item, least total damage within a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

CELLS = 1 << 20  # budgets told apart


class Knapsack:
    """Solves for every budget at once, by dynamic programming over budgets.

    Costs are integers and mostly multiples of a large common divisor (layers have round sizes), so that the budgets
    fall into few cells and the solution is exact. Where there would be more than CELLS of them they are made coarser
    and costs rounded up: still within the budget.
    """

    def __init__(self, costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]]) -> None:
        """
        Args:
            costs, damages: of each option of each item; no item is without options.
        """
        self.least, self.most = sum(min(c) for c in costs), sum(max(c) for c in costs)
        extra = [[c - min(item) for c in item] for item in costs]
        self.cell = functools.reduce(math.gcd, (e for item in extra for e in item), 0) or 1
        self.cell = max(self.cell, -(-(self.most - self.least) // CELLS))
        self._steps = [[-(-e // self.cell) for e in item] for item in extra]
        top = sum(max(item) for item in self._steps)
        self._total = np.zeros(top + 1)  # least damage with at most so many cells, over the items so far
        self._chosen = []
        for steps, damage in zip(self._steps, damages):
            total, chosen = np.full(top + 1, np.inf), np.zeros(top + 1, np.uint8)
            for index, (step, loss) in enumerate(zip(steps, damage)):
                candidate = self._total[:top + 1 - step] + loss
                better = candidate < total[step:]
                total[step:][better], chosen[step:][better] = candidate[better], index
            self._total = total
            self._chosen.append(chosen)

    def solve(self, budget: int) -> list[int] | None:
        """The option of each item; None where even the cheapest ones cost more than the budget."""
        if budget < self.least:
            return None
        at, options = self._at(budget), []
        for steps, chosen in zip(reversed(self._steps), reversed(self._chosen)):
            option = int(chosen[at])
            options.append(option)
            at -= steps[option]
        return options[::-1]

    def damage(self, budget: int) -> float:
        """The least damage within a budget; infinite where there is no solution."""
        return math.inf if budget < self.least else float(self._total[self._at(budget)])

    def budget_for(self, damage: float) -> int:
        """The smallest budget that keeps to this damage, or the largest useful one where none does."""
        within = np.flatnonzero(self._total <= damage)
        return self.least + self.cell * int(within[0] if len(within) else len(self._total) - 1)

    def _at(self, budget: int) -> int:
        return min((budget - self.least) // self.cell, len(self._total) - 1)
