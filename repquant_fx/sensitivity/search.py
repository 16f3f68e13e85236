"""Mixed precision: the bits of each layer that do the least damage within a size, or the smallest size that is good
enough.

Damages of single layers are taken to add up (their errors are nearly independent), so the choice is a knapsack, solved
exactly for every size at once. A size is then met without trying anything. For a quality the recipes along that
frontier are compiled and measured, and
the smallest that reaches it is found by bisection: what is promised was measured, not predicted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from repquant_fx.compiled import CompiledModel
from repquant_fx.compiler import compile_model
from repquant_fx.errors import InputError
from repquant_fx.frontends.memory import left_as_found
from repquant_fx.options import Calibration, Run, Source, from_keywords
from repquant_fx.preparation import prepare
from repquant_fx.recipe import LayerRule, Recipe
from repquant_fx.recipe_text import write
from repquant_fx.sensitivity.analysis import PROBES, Sensitivity, analyse
from repquant_fx.sensitivity.knapsack import Knapsack
from repquant_fx.sensitivity.size import COUNTS, bits_counted, read_size, weight_bits
from repquant_fx.sensitivity.units import ACTIVATIONS, WEIGHTS, Unit

CHOICES = (2, 3, 4, 6, 8)
TRIALS = 8
FINE = 0.01  # of the range of sizes: bisection stops there


@dataclass(frozen=True)
class Trial:
    """A recipe that was compiled and measured: bits per weight (as counted), and the quality measured."""

    bits_per_weight: float
    quality: float
    accepted: bool


@dataclass(frozen=True)
class SearchResult:
    """The result of `search`.

    Attributes:
        recipe: what `compile` takes.
        bits: chosen, by unit.
        count: how sizes are counted, `stored` or `information`.
        weight_bytes: of all weights in that count; scales and biases not included.
        bits_per_weight: the same, divided by the number of weights.
        mean_abits: mean over activation values, but those that rules or `input_bits` fix.
        predicted: damage of the recipe, all layers together; see `Sensitivity.loss`.
        predicted_uniform: the same for the uniform bits (among the choices) that cost no more, and their number; None
            where none do.
        trials: what was compiled and measured on the way.
        sensitivity: that the choice is made from.
    """

    recipe: Recipe
    bits: dict[Unit, int]
    count: str
    weight_bytes: float
    bits_per_weight: float
    mean_abits: float
    predicted: float
    predicted_uniform: tuple[int, float] | None
    trials: tuple[Trial, ...]
    sensitivity: Sensitivity

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        uniform = self.predicted_uniform
        return {
            "recipe": self.recipe.to_dict(),
            "count": self.count,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "mean_abits": self.mean_abits,
            "loss": self.sensitivity.loss,
            "predicted": self.predicted,
            "predicted_uniform": None if uniform is None else {"bits": uniform[0], "damage": uniform[1]},
            "trials": [vars(t) for t in self.trials],
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
        lines = [
            f"weights {self.weight_bytes / 1e6:.3f} MB as {self.count}, {self.bits_per_weight:.2f} bits each "
            f"({shares}); "
            f"activations {self.mean_abits:.2f} bits"
        ]
        predicted = f"predicted {_damage(self.predicted, self.sensitivity.loss)} for rounding layers one at a time"
        if self.predicted_uniform is not None:
            bits, damage = self.predicted_uniform
            predicted += f"; uniform {bits}-bit weights {_damage(damage, self.sensitivity.loss)}"
        return "\n".join([*lines, predicted])

    def to_text(self, form: str = "yaml") -> str:
        """The recipe as a file, `yaml` or `toml`, with comments on where it comes from."""
        lines = ["Mixed precision, chosen by `repquant-fx search`.", *str(self).splitlines()]
        return "".join(f"# {line}\n" for line in lines) + write(self.recipe, form)


@dataclass(frozen=True)
class Target:
    """What a recipe must reach; the arguments of `search` of these names. Exactly one is given.

    Raises:
        InputError: none or several are.
    """

    target_size: str | None = None
    target_sqnr: float | None = None
    quality: Callable[[CompiledModel], float] | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        given = sum(target is not None for target in (self.target_size, self.target_sqnr, self.quality))
        if given != 1 or (self.quality is None) != (self.at_least is None):
            raise InputError("give one target: a size, an SQNR, or a drop (a quality and what it must reach)")

    def measure(self) -> tuple[Callable[[CompiledModel], float], float]:
        """Of a target that is not a size: how to measure a compiled model, and what it must reach."""
        if self.target_sqnr is not None:
            return _output_sqnr, self.target_sqnr
        assert self.quality is not None and self.at_least is not None
        return self.quality, self.at_least


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


@left_as_found
def search(
    model: Any, calibration: Any = None, recipe: Recipe | None = None, *, target_size: str | None = None,
    target_sqnr: float | None = None, quality: Callable[[CompiledModel], float] | None = None,
    at_least: float | None = None, choices: Iterable[int] = CHOICES, mean_abits: float | None = None,
    activation_choices: Iterable[int] = CHOICES, count: str = "stored", loss: str = "error", probes: int = PROBES,
    trials: int = TRIALS, sensitivity: Sensitivity | None = None, **keywords: Any,
) -> SearchResult:
    """Choose bits for each layer. Exactly one target is given.

    Args:
        model, calibration, keywords: as `compile` takes them: samples, batch_size, seed, arch and so on, all that say
            what is loaded and what it is run on. Data that can be read but once will not do for a target of quality,
            which compiles several times.
        recipe: everything but the bits of weights; bits that a rule of it sets stay.
        target_size: of the weights at most: `400kB`, `1.5MB`, or `3.5b` for bits per weight.
        target_sqnr: dB of the output against the float model's on held-back samples, as in the report of `compile`, at
            least.
        quality, at_least: any other measure of a compiled model, larger is better, and what it must reach.
        choices: bits of weights.
        mean_abits: let the bits of activations vary too, with this mean over their values; all as the recipe says where
            None.
        activation_choices: bits of activations, where they vary.
        count: what size means: see `sensitivity.size`.
        loss, probes: see `sensitivity`.
        trials: recipes compiled at most, for a target of quality.
        sensitivity: of this model and recipe, computed before for all choices; saves its time.

    Raises:
        InputError: no or several targets, options that make no sense, a size too small, or a quality that the largest
            choices miss.
    """
    source, data = from_keywords(model, calibration, keywords)
    return search_recipe(source, data, recipe, Target(target_size, target_sqnr, quality, at_least),
                         Choices(choices, activation_choices, mean_abits, count), loss=loss, probes=probes,
                         trials=trials, sensitivity=sensitivity)


def search_recipe(
    source: Source, calibration: Calibration, recipe: Recipe | None, target: Target, choices: Choices, *,
    loss: str = "error", probes: int = PROBES, trials: int = TRIALS, sensitivity: Sensitivity | None = None,
) -> SearchResult:
    """`search`, of what it was given as objects.

    Raises:
        InputError: as `search` does.
    """
    recipe = Recipe.of(recipe)
    if trials < 1:
        raise InputError(f"at least 1 trial is needed, not {trials}")
    if sensitivity is None:
        activations = choices.activation_choices if choices.mean_abits is not None else None
        sensitivity = analyse(prepare(source, calibration, recipe), recipe, weight_choices=choices.choices,
                              activation_choices=activations, loss=loss, probes=probes, seed=calibration.seed)
    space = _Space(sensitivity, choices)
    if target.target_size is not None:
        return space.result(read_size(target.target_size, space.weights))
    measure, at_least = target.measure()
    guess = None
    if target.target_sqnr is not None and sensitivity.loss == "error":
        guess = space.knapsack.budget_for(10 ** (-target.target_sqnr / 10))

    def quality_of(result: SearchResult) -> float:
        return measure(compile_model(source, calibration, result.recipe, Run(check=False)))

    return _bisect(space, quality_of, at_least, guess, trials)


def _output_sqnr(compiled: CompiledModel) -> float:
    value = compiled.report["output_sqnr_db"]
    return math.inf if value is None else float(value)


def _bisect(
    space: _Space, quality_of: Callable[[SearchResult], float], at_least: float, guess: int | None, trials: int
) -> SearchResult:
    """The smallest recipe on the frontier that was measured to reach a quality."""
    done: list[Trial] = []

    def accepted(result: SearchResult) -> bool:
        quality = quality_of(result)
        done.append(Trial(result.bits_per_weight, quality, quality >= at_least))
        return done[-1].accepted

    low, high = space.knapsack.least, space.knapsack.most
    best = space.result(high)
    if not accepted(best):
        raise InputError(
            f"the target of {at_least:g} is out of reach: {done[-1].quality:.4g} with all choices at their largest; "
            "raise the bits "
            "of activations, allow more bits, or lower the target"
        )
    budget, fine = guess if guess is not None else (low + high) // 2, FINE * (high - low)
    if space.knapsack.solve(low) is not None and low < high:
        while len(done) < trials and high - low > fine:
            budget = min(max(budget, low), high - 1)
            result = space.result(budget)
            if result.bits == best.bits:
                high = budget
            elif accepted(result):
                best, high = result, budget
            else:
                low = budget
            budget = (low + high) // 2
    return replace(best, trials=tuple(done))


class _Space:
    """The recipes on the frontier of size and damage."""

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
        self.abits = {u: u.bits for u in self.units[ACTIVATIONS]}
        if choices.mean_abits is not None:
            self.abits = self._activations(list(choices.activation_choices), choices.mean_abits)

    def _activations(self, choices: list[int], mean: float) -> dict[Unit, int]:
        """Bits of activations: their number is bounded by a mean over values, whatever the weights are."""
        free = [u for u in self.units[ACTIVATIONS] if not u.pinned]
        knapsack = Knapsack([[u.elements * b for b in choices] for u in free],
                            [[u.damage[b] for b in choices] for u in free])
        chosen = knapsack.solve(math.floor(mean * sum(u.elements for u in free)))
        if chosen is None:
            raise InputError(
                f"activations of {mean:g} bits in the mean cannot be had from choices of {min(choices)} bits and more"
            )
        return {u: u.bits for u in self.units[ACTIVATIONS] if u.pinned} | {u: choices[i] for u, i in zip(free, chosen)}

    def result(self, budget: int) -> SearchResult:
        """The recipe with the least damage in a budget of bits.

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
        by_unit = {u: o[i] for u, o, i in zip(self.units[WEIGHTS], self.options, chosen)} | self.abits
        bits = {u: by_unit[u] for u in self.sensitivity.units}  # in graph order
        size = weight_bits(self.sensitivity.units, bits, self.count)
        values = {u: u.elements for u in self.units[ACTIVATIONS] if not u.pinned}
        uniform = None
        for b in self.choices:
            same = {u: b if u.kind == WEIGHTS and not u.pinned else bits[u] for u in bits}
            if weight_bits(self.sensitivity.units, same, self.count) <= budget:
                uniform = (b, _total(same))
        return SearchResult(
            _recipe(self.sensitivity.recipe, bits),
            bits,
            self.count,
            size / 8,
            size / self.weights,
            sum(n * bits[u] for u, n in values.items()) / (sum(values.values()) or 1),
            _total(bits),
            uniform,
            (),
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
    added = [LayerRule(_literal(path), **rule) for path, rule in rules.items()]
    return replace(base, **common, layers=(*base.layers, *added))


def _literal(path: str) -> str:
    """A glob that matches this path alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
