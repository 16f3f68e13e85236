"""The recipes of least damage for every size of weights, and the uniform ones beside them.

Damages of single layers are taken to add up (their errors are nearly independent), so the choice is a knapsack, solved
exactly for every size at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from repquant_fx.errors import InputError
from repquant_fx.recipe import LayerRule, Recipe, literal
from repquant_fx.recipe_text import write
from repquant_fx.sensitivity.analysis import Sensitivity
from repquant_fx.sensitivity.knapsack import Knapsack
from repquant_fx.sensitivity.size import COUNTS, bits_counted, weight_bits
from repquant_fx.sensitivity.units import ACTIVATIONS, WEIGHTS, Unit

CHOICES = (2, 3, 4, 6, 8)
SEARCHED = "searched bits"


@dataclass(frozen=True)
class Trial:
    """A recipe that was compiled and measured.

    Attributes:
        what: in words: searched or uniform bits.
        bits_per_weight: as counted.
        quality: measured.
        accepted: of a target of quality: whether it reaches that; of a size: whether it is the result.
    """

    what: str
    bits_per_weight: float
    quality: float
    accepted: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON data; a quality without bound (an output without error) is None."""
        return {**vars(self), "quality": self.quality if math.isfinite(self.quality) else None}


@dataclass(frozen=True)
class SearchResult:
    """The result of `search`.

    Attributes:
        recipe: what `compile` takes.
        bits: chosen, by unit.
        what: in words: searched or uniform bits.
        count: how sizes are counted, `stored` or `information`.
        weight_bytes: of all weights in that count; scales and biases not included.
        bits_per_weight: the same, divided by the number of weights.
        mean_abits: mean over activation values, but those that rules or `input_bits` fix.
        predicted: damage of the recipe, all layers together; see `Sensitivity.loss`.
        predicted_uniform: the most uniform bits of weights (among the choices) that cost no more, and their damage.
        sensitivity: that the choice is made from.
        trials: what was compiled and measured on the way.
        verdict: what the trial against uniform bits said, a sentence; None where there was none.
        fallback: the trial found what was searched no better, and this is something else.
    """

    recipe: Recipe
    bits: dict[Unit, int]
    what: str
    count: str
    weight_bytes: float
    bits_per_weight: float
    mean_abits: float
    predicted: float
    predicted_uniform: tuple[int, float]
    sensitivity: Sensitivity
    trials: tuple[Trial, ...] = ()
    verdict: str | None = None
    fallback: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        bits, damage = self.predicted_uniform
        return {
            "recipe": self.recipe.to_dict(),
            "what": self.what,
            "count": self.count,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "mean_abits": self.mean_abits,
            "loss": self.sensitivity.loss,
            "predicted": self.predicted,
            "predicted_uniform": {"bits": bits, "damage": damage},
            "trials": [t.to_dict() for t in self.trials],
            "verdict": self.verdict,
            "fallback": self.fallback,
            "units": [
                {"kind": u.kind, "name": u.name, "paths": list(u.paths), "bits": b, "elements": u.elements}
                for u, b in self.bits.items()
            ],
        }

    def __str__(self) -> str:
        used = Counter[int]()
        for unit, bits in self.bits.items():
            used[bits] += unit.elements if unit.kind == WEIGHTS else 0
        total = sum(used.values()) or 1
        shares = ", ".join(f"{100 * n / total:.0f} % at {b}" for b, n in sorted(used.items()) if n)
        bits, damage = self.predicted_uniform
        lines = [
            f"weights {self.weight_bytes / 1e6:.3f} MB as {self.count}, {self.bits_per_weight:.2f} bits each "
            f"({shares}); "
            f"activations {self.mean_abits:.2f} bits",
            f"predicted {_damage(self.predicted, self.sensitivity.loss)} for rounding layers one at a time; "
            f"uniform {bits}-bit weights {_damage(damage, self.sensitivity.loss)}",
        ]
        return "\n".join(lines if self.verdict is None else [*lines, self.verdict])

    def to_text(self, form: str = "yaml") -> str:
        """The recipe as a file, `yaml` or `toml`, with comments on where it comes from."""
        lines = ["Mixed precision, chosen by `repquant-fx search`.", *str(self).splitlines()]
        return "".join(f"# {line}\n" for line in lines) + write(self.recipe, form)


@dataclass(frozen=True)
class Choices:
    """What may be chosen and how it is counted; the arguments of `search` of these names.

    Raises:
        InputError: there is nothing to choose from, or no such count.
    """

    choices: Iterable[int] = CHOICES
    activation_choices: Iterable[int] = CHOICES
    mean_abits: float | None = None
    count: str = "stored"

    def __post_init__(self) -> None:
        if self.count not in COUNTS:
            raise InputError(f"count is one of {', '.join(COUNTS)}; found {self.count!r}")
        for name in ("choices", "activation_choices"):
            bits = tuple(sorted(set(getattr(self, name))))
            if not bits:
                raise InputError("there are no bits to choose from")
            object.__setattr__(self, name, bits)


class Frontier:
    """The recipes on the frontier of size and damage.

    Attributes:
        weights: their number.
        knapsack: of the bits of weights.
        abits: bits of activations, searched or as the recipe says.
        even, even_abits: uniform bits of activations of no larger mean, and the same by unit; what the recipe says
            where they are not searched.
    """

    def __init__(self, sensitivity: Sensitivity, choices: Choices) -> None:
        self.sensitivity, self.count = sensitivity, choices.count
        self.units = {kind: [u for u in sensitivity.units if u.kind == kind] for kind in (WEIGHTS, ACTIVATIONS)}
        self.weights = sum(u.elements for u in self.units[WEIGHTS])
        if not self.weights:
            raise InputError("no layer has weights whose bits could be chosen")
        self.choices = list(choices.choices)
        self.options = [_options(u, self.choices) for u in self.units[WEIGHTS]]
        self.knapsack = Knapsack(
            [[u.elements * bits_counted(b, self.count) for b in o] for u, o in zip(self.units[WEIGHTS], self.options)],
            [[u.damage[b] for b in o] for u, o in zip(self.units[WEIGHTS], self.options)])
        self.abits = self.even_abits = {u: u.bits for u in self.units[ACTIVATIONS]}
        self.even = sensitivity.recipe.abits
        if choices.mean_abits is not None:
            self.abits = self._activations(list(choices.activation_choices), choices.mean_abits)
            self.even = max((b for b in choices.activation_choices if b <= choices.mean_abits), default=self.even)
            self.even_abits = {u: u.bits if u.pinned else self.even for u in self.units[ACTIVATIONS]}

    def _activations(self, choices: list[int], mean: float) -> dict[Unit, int]:
        """Bits of activations: their number is bounded by a mean over values, whatever the weights are."""
        free = [u for u in self.units[ACTIVATIONS] if not u.pinned]
        options = [_options(u, choices) for u in free]
        knapsack = Knapsack([[u.elements * b for b in o] for u, o in zip(free, options)],
                            [[u.damage[b] for b in o] for u, o in zip(free, options)])
        chosen = knapsack.solve(math.floor(mean * sum(u.elements for u in free)))
        if chosen is None:
            raise InputError(
                f"activations of {mean:g} bits in the mean cannot be had from choices of {min(choices)} bits and more"
            )
        return {u: u.bits for u in self.units[ACTIVATIONS] if u.pinned} | {u: choices[i] for u, i in zip(free, chosen)}

    def result(self, budget: int, *, even: bool = False) -> SearchResult:
        """The recipe with the least damage in a budget of bits; of activations with uniform bits where `even` is set.

        Raises:
            InputError: the budget is too small.
        """
        chosen = self.knapsack.solve(budget)
        if chosen is None:
            least = self.knapsack.least
            hint = (
                "; up to 4 bits are stored as 4: count the size as information to use fewer"
                if self.count == "stored"
                else ""
            )
            raise InputError(
                f"the weights do not fit {budget / 8e6:.3f} MB ({budget / self.weights:.2f} bits each): with the least "
                "bits they take "
                f"{least / 8e6:.3f} MB ({least / self.weights:.2f} bits each){hint}"
            )
        weights = {u: o[i] for u, o, i in zip(self.units[WEIGHTS], self.options, chosen)}
        if even and self.even_abits != self.abits:
            what = f"searched weights with uniform {self.even}-bit activations"
            return self._described(what, weights | self.even_abits, budget)
        return self._described(SEARCHED, weights | self.abits, budget)

    def uniform(self, budget: int) -> SearchResult:
        """The recipe of uniform bits in a budget that the searched ones keep to."""
        bits = self._uniform_bits(budget)
        return self._described(f"uniform W{bits}A{self.even}", self._weights_at(bits) | self.even_abits, budget)

    def _weights_at(self, bits: int) -> dict[Unit, int]:
        return {u: u.bits if u.pinned else bits for u in self.units[WEIGHTS]}

    def _uniform_bits(self, budget: int) -> int:
        """The most uniform bits of weights in a budget; the least of the choices fit all that is not too small."""
        sizes = {b: weight_bits(self.units[WEIGHTS], self._weights_at(b), self.count) for b in self.choices}
        return max((b for b, size in sizes.items() if size <= budget), default=self.choices[0])

    def _described(self, what: str, bits: Mapping[Unit, int], budget: int) -> SearchResult:
        bits = {u: bits[u] for u in self.sensitivity.units}  # in graph order
        size = weight_bits(self.sensitivity.units, bits, self.count)
        values = {u: u.elements for u in self.units[ACTIVATIONS] if not u.pinned}
        uniform = self._uniform_bits(budget)
        return SearchResult(
            _recipe(self.sensitivity.recipe, bits),
            bits,
            what,
            self.count,
            size / 8,
            size / self.weights,
            sum(n * bits[u] for u, n in values.items()) / (sum(values.values()) or 1),
            _total(bits),
            (uniform, _total(bits | self._weights_at(uniform))),
            self.sensitivity,
        )


def _options(unit: Unit, choices: list[int]) -> list[int]:
    options = [unit.bits] if unit.pinned else choices
    missing = [b for b in options if b not in unit.damage]
    if missing:
        raise InputError(f"the sensitivity given does not hold {unit.name} at {missing[0]} bits")
    return options


def _total(bits: Mapping[Unit, int]) -> float:
    return sum(unit.damage[b] for unit, b in bits.items())


def _damage(value: float, loss: str) -> str:
    return f"{value:.3g} nats" if loss == "kl" else f"{-10 * math.log10(value):.1f} dB" if value > 0 else "no error"


def _recipe(base: Recipe, bits: Mapping[Unit, int]) -> Recipe:
    """The base with a rule for each path whose bits are not the most common ones."""
    common: dict[str, Any] = {}
    for kind, name in ((WEIGHTS, "wbits"), (ACTIVATIONS, "abits")):
        counted = Counter(b for u, b in bits.items() if u.kind == kind and not u.pinned)
        common[name] = min(counted, key=lambda b: (-counted[b], b)) if counted else getattr(base, name)
    rules: dict[str, dict[str, Any]] = {}
    for unit, b in bits.items():
        name = "wbits" if unit.kind == WEIGHTS else "abits"
        for path in unit.paths if not unit.pinned and b != common[name] else ():
            rules.setdefault(path, {})[name] = b
    added = [LayerRule(literal(path), **rule) for path, rule in rules.items()]
    return replace(base, **common, layers=(*base.layers, *added))
