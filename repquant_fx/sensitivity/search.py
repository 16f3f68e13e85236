"""Mixed precision: the bits of each layer that do the least damage within a size, or the smallest size that is good
enough.

The prediction behind it takes damages of single layers to add up (`sensitivity.frontier`), which can be wrong where
bits are few. So what is promised was measured: for a quality the recipes along the frontier are compiled, and the
smallest that reaches it is found by bisection; for a size the recipe is compiled beside uniform bits of no larger size,
and gives way to them where it is no better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repquant_fx import log
from repquant_fx.compiled import CompiledModel
from repquant_fx.compiler import compile_model
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.frontends.memory import left_as_found
from repquant_fx.options import Calibration, Run, Source, from_keywords
from repquant_fx.preparation import prepare
from repquant_fx.recipe import Recipe
from repquant_fx.sensitivity.analysis import PROBES, Sensitivity, analyse
from repquant_fx.sensitivity.frontier import CHOICES, Choices, Frontier, SearchResult, Trial
from repquant_fx.sensitivity.size import read_size

TRIALS = 8
FINE = 0.01  # of the range of sizes: bisection stops there


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


@left_as_found
def search(
    model: Any, calibration: Any = None, recipe: Recipe | None = None, *, target_size: str | None = None,
    target_sqnr: float | None = None, quality: Callable[[CompiledModel], float] | None = None,
    at_least: float | None = None, choices: Iterable[int] = CHOICES, mean_abits: float | None = None,
    activation_choices: Iterable[int] = CHOICES, count: str = "stored", loss: str = "error", probes: int = PROBES,
    trials: int = TRIALS, trial: bool = True, sensitivity: Sensitivity | None = None, **keywords: Any,
) -> SearchResult:
    """Choose bits for each layer. Exactly one target is given.

    Args:
        model, calibration, keywords: as `compile` takes them: samples, batch_size, seed, arch and so on, all that say
            what is loaded and what it is run on. Data that can be read but once will not do, since several recipes are
            compiled.
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
        trial: compile the recipe of a target size, and uniform bits of no larger size, and compare the SQNR of their
            outputs on held-back samples. Where uniform bits are as good they are the result, and a warning and the
            result's `verdict` say so; bits of activations give way first. Two compiles, three where those vary.
        sensitivity: of this model and recipe, computed before for all choices; saves its time.

    Raises:
        InputError: no or several targets, options that make no sense, a size too small, a quality that the largest
            choices miss, or data that can be read but once.
    """
    source, data = from_keywords(model, calibration, keywords)
    return search_recipe(source, data, recipe, Target(target_size, target_sqnr, quality, at_least),
                         Choices(choices, activation_choices, mean_abits, count), loss=loss, probes=probes,
                         trials=trials, trial=trial, sensitivity=sensitivity)


def search_recipe(
    source: Source, calibration: Calibration, recipe: Recipe | None, target: Target, choices: Choices, *,
    loss: str = "error", probes: int = PROBES, trials: int = TRIALS, trial: bool = True,
    sensitivity: Sensitivity | None = None,
) -> SearchResult:
    """`search`, of what it was given as objects.

    Raises:
        InputError: as `search` does.
    """
    recipe = Recipe.of(recipe)
    if trials < 1:
        raise InputError(f"at least 1 trial is needed, not {trials}")
    if not trial and target.target_size is None:
        raise InputError("a target other than a size is met by trials alone")
    if trial and isinstance(calibration.data, Iterator):
        raise InputError("the calibration data can be read but once, and several recipes are compiled on it: give a "
                         "list, or a callable that gives it anew")
    if sensitivity is None:
        activations = choices.activation_choices if choices.mean_abits is not None else None
        sensitivity = analyse(prepare(source, calibration, recipe), recipe, weight_choices=choices.choices,
                              activation_choices=activations, loss=loss, probes=probes, seed=calibration.seed)
    result = _measured(Frontier(sensitivity, choices), source, calibration, target, trials, trial=trial)
    if result.fallback:
        warnings.warn(f"search {result.verdict}", RepQuantWarning, stacklevel=2)
    return result


def _measured(
    frontier: Frontier, source: Source, calibration: Calibration, target: Target, trials: int, *, trial: bool
) -> SearchResult:
    """The recipe on a frontier that reaches a target, by compiling some."""
    def compiled(result: SearchResult) -> CompiledModel:
        return compile_model(source, calibration, result.recipe, Run(check=False, with_past=False))

    if target.target_size is not None:
        budget = read_size(target.target_size, frontier.weights)
        searched = frontier.result(budget)
        if not trial:
            return searched
        candidates = [searched, frontier.result(budget, even=True), frontier.uniform(budget)]
        return _best(candidates, lambda result: _output_sqnr(compiled(result)))
    measure, at_least = target.measure()
    guess = None
    if target.target_sqnr is not None and frontier.sensitivity.loss == "error":
        guess = frontier.knapsack.budget_for(10 ** (-target.target_sqnr / 10))
    return _bisect(frontier, lambda result: measure(compiled(result)), at_least, guess, trials)


def _output_sqnr(compiled: CompiledModel) -> float:
    value = compiled.report["output_sqnr_db"]
    return math.inf if value is None else float(value)


def _best(candidates: Sequence[SearchResult], quality_of: Callable[[SearchResult], float]) -> SearchResult:
    """The first candidate that was measured to be better than the last, the uniform bits; these where none is."""
    distinct = [c for i, c in enumerate(candidates) if all(c.bits != later.bits for later in candidates[i + 1:])]
    first, uniform = distinct[0], distinct[-1]
    if first is uniform:  # nothing to choose between
        return first
    log.info(f"trial: compiling {first.what} beside {uniform.what}")
    level = quality_of(uniform)
    best, qualities = uniform, list[float]()
    for candidate in distinct[:-1]:
        qualities.append(quality_of(candidate))
        if qualities[-1] > level:
            best = candidate
            break
    pairs = [*zip(distinct, qualities), (uniform, level)]
    done = tuple(Trial(c.what, c.bits_per_weight, quality, c is best) for c, quality in pairs)
    (chosen,) = (t for t in done if t.accepted)
    others = " and ".join(f"{t.what} {t.quality:.1f} dB" for t in done if not t.accepted)
    verdict = f"{chosen.what} gave {chosen.quality:.1f} dB on held-back samples, {others}"
    fallback = best is not first
    return replace(best, trials=done, verdict=f"fell back: {verdict}" if fallback else verdict, fallback=fallback)


def _bisect(
    frontier: Frontier, quality_of: Callable[[SearchResult], float], at_least: float, guess: int | None, trials: int
) -> SearchResult:
    """The smallest recipe on the frontier that was measured to reach a quality."""
    done: list[Trial] = []

    def accepted(result: SearchResult) -> bool:
        quality = quality_of(result)
        done.append(Trial(result.what, result.bits_per_weight, quality, quality >= at_least))
        return done[-1].accepted

    low, high = frontier.knapsack.least, frontier.knapsack.most
    best, even = frontier.result(high), False
    if not accepted(best):
        even, level = True, frontier.result(high, even=True)
        if level.bits == best.bits or len(done) == trials or not accepted(level):
            most = max(t.quality for t in done)
            raise InputError(
                f"the target of {at_least:g} is out of reach: {most:.4g} with all choices at their largest; raise the "
                "bits of activations, allow more bits, or lower the target"
            )
        best = level
    budget, fine = guess if guess is not None else (low + high) // 2, FINE * (high - low)
    if frontier.knapsack.solve(low) is not None and low < high:
        while len(done) < trials and high - low > fine:
            budget = min(max(budget, low), high - 1)
            result = frontier.result(budget, even=even)
            if result.bits == best.bits:
                high = budget
            elif accepted(result):
                best, high = result, budget
            else:
                low = budget
            budget = (low + high) // 2
    verdict = None
    if even:
        verdict = (f"fell back: {done[1].what} gave {done[1].quality:.4g} at the largest choices, {done[0].what} "
                   f"{done[0].quality:.4g}")
    return replace(best, trials=tuple(done), verdict=verdict, fallback=even)
