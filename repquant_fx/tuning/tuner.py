"""The tuner: compile every form quickly, time it beside the start, choose, and measure the choice as a whole.

What takes time in compiling and not in running is off while forms are tried (`QUICK`): their speed is the same. Their
SQNR is compared with that of the start compiled as quickly. The combination that is chosen, and the start, are compiled
with the recipe's own settings and on all of the data, and these two decide.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from repquant_fx import log
from repquant_fx.compiled import CompiledModel
from repquant_fx.compiler import compile_model
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.frontends.memory import left_as_found
from repquant_fx.options import Calibration, Run, Source, from_keywords
from repquant_fx.preparation import Prepared, captured_once, prepare
from repquant_fx.recipe import Recipe, RecipeLike
from repquant_fx.targets import DEFAULT, find
from repquant_fx.tuning.candidates import Form, apply, candidates
from repquant_fx.tuning.choose import Speed, Trial, choose, settle
from repquant_fx.tuning.conditions import MAX_DROP, SECONDS, TRIALS, Conditions
from repquant_fx.tuning.result import Measured, TuneResult
from repquant_fx.tuning.timing import Runner, runner, take_turns

QUICK: dict[str, Any] = {"gptq": False, "correction": False, "clipping": "none", "activations": "minmax",
                         "weights": "minmax", "softmax_scale": "percentile", "rotate": (), "reconstruct": 0}
QUICK_SAMPLES = 32


@left_as_found
def tune(
    model: Any, calibration: Any = None, recipe: RecipeLike | None = None, *, target: str = DEFAULT,
    threads: int | None = None, batch: int | None = None, max_drop: float = MAX_DROP, seconds: float = SECONDS,
    trials: int = TRIALS, **keywords: Any,
) -> TuneResult:
    """Find the recipe that runs fastest on this machine, of those that differ from one in the forms of
    `tuning.candidates`.

    Args:
        model, calibration, keywords: as `compile` takes them: samples, batch_size, seed, arch and so on, all that say
            what is loaded and what it is run on. Data must be given, and more than once: several recipes are compiled.
        recipe: to start from; RepQuant at W8A8 where None.
        target: `ort-cpu`, `ort-cpu-avx2` or `openvino`; models are timed in its runtime.
        threads: of the runtime; its default where None.
        batch: samples of a run; 1 where None, or what a model with a fixed batch takes.
        max_drop: dB of SQNR of the output, on held-back samples, that may be lost against the start.
        seconds: that each form runs, about, and the start as long beside it.
        trials: combinations that are compiled with the recipe's own settings, at most.

    Raises:
        InputError: no data, data that can be read but once, a target that cannot be timed here, or what `compile`
            raises.
    """
    source, data = from_keywords(model, calibration, keywords)
    return tune_recipe(source, data, recipe, Conditions(target, threads, batch, max_drop, seconds, trials))


def tune_recipe(
    source: Source, calibration: Calibration, recipe: RecipeLike | None, conditions: Conditions
) -> TuneResult:
    """`tune`, of what it was given as objects.

    Raises:
        InputError: as `tune` does.
    """
    recipe = Recipe.of(recipe)
    if calibration.data is None:
        raise InputError("tuning weighs speed against quality, so it needs calibration data: give some (--calib)")
    if isinstance(calibration.data, Iterator):
        raise InputError("the calibration data can be read but once, and several recipes are compiled on it: give a "
                         "list, or a callable that gives it anew")
    source = captured_once(source)
    few = min(QUICK_SAMPLES, calibration.samples or QUICK_SAMPLES)
    target = find(conditions.target)
    prepared = prepare(source, replace(calibration, samples=few), target.recipe(recipe))
    inputs = inputs_of(prepared, conditions.batch)
    conditions = replace(conditions, batch=len(next(iter(inputs.values()))))
    bench = _Bench(source, conditions, inputs)
    forms = candidates(prepared.plan, prepared.recipe)
    del prepared
    quick = replace(calibration, samples=few)
    with _quiet():
        start = bench.start(replace(recipe, **QUICK), quick)
    trials = []
    for index, form in enumerate(forms, 1):
        found = bench.measure([form], quick)
        trials.append(Trial.failed(form, found) if isinstance(found, str) else Trial(form, *found))
        log.info(f"form {index} of {len(forms)}, {trials[-1].summary}")
    verdicts = choose(start.sqnr_db, trials, conditions.max_drop)
    if not any(verdict.kept for verdict in verdicts):
        return TuneResult(recipe, recipe, conditions, start, verdicts)
    log.info("the start and what was kept, with the recipe's own settings")
    whole = bench.start(recipe, calibration)
    attempts = settle(whole.sqnr_db, verdicts, lambda chosen: bench.measure(chosen, calibration), conditions.max_drop,
                      conditions.trials)
    best = apply(recipe, attempts[-1].forms) if attempts[-1].accepted else recipe
    result = TuneResult(best, recipe, conditions, start, verdicts, whole, attempts)
    if result.fallback:
        warnings.warn(f"tune {result.verdict}", RepQuantWarning, stacklevel=2)
    return result


class _Bench:
    """The start as it was compiled last, and all that is compiled to be timed beside it."""

    def __init__(self, source: Source, conditions: Conditions, inputs: dict[str, np.ndarray]) -> None:
        self.source, self.conditions, self.inputs = source, conditions, inputs
        self.runtime = find(conditions.target).runtime
        self._recipe: Recipe | None = None
        self._run: Runner | None = None

    def start(self, recipe: Recipe, calibration: Calibration) -> Measured:
        """Compile a recipe that others are to be timed beside."""
        self._run = None  # the former one goes before there is another
        compiled = self._compiled(recipe, calibration)
        self._recipe, self._run = recipe, self._runner(compiled)
        return Measured(sqnr_of(compiled), compiled.model.size())

    def measure(self, forms: Sequence[Form], calibration: Calibration) -> tuple[Speed, float, int] | str:
        """The start with some forms: how many times faster, SQNR in dB, bytes of the file; or why it cannot be compiled
        or run so, which is no error: it is not taken.
        """
        assert self._recipe is not None and self._run is not None
        try:
            with _quiet():
                compiled = self._compiled(apply(self._recipe, forms), calibration)
            run = self._runner(compiled)
        except InputError as error:
            return str(error)
        log.stage("time")
        times = take_turns([self._run, run], self.conditions.seconds)
        log.finish()
        return Speed.of(*times), sqnr_of(compiled), compiled.model.size()

    def _compiled(self, recipe: Recipe, calibration: Calibration) -> CompiledModel:
        run = Run(check=False, with_past=False, target=self.conditions.target)
        return compile_model(self.source, calibration, recipe, run)

    def _runner(self, compiled: CompiledModel) -> Runner:
        return runner(compiled.model, self.runtime, self.inputs, self.conditions.threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings on the model and the recipe: those were said when the model was prepared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepQuantWarning)
        yield


def sqnr_of(compiled: CompiledModel) -> float:
    """dB of the output on held-back samples, against the float model's."""
    value = compiled.report["output_sqnr_db"]
    return math.inf if value is None else float(value)


def inputs_of(prepared: Prepared, batch: int | None) -> dict[str, np.ndarray]:
    """Calibration samples to run a model on, by the names of its inputs; repeated where there are fewer than `batch`.

    Raises:
        InputError: the model takes batches of another size alone.
    """
    first = prepared.data.batches[0]
    if not prepared.captured.dynamic_batch:
        if batch not in (None, len(first[0])):
            raise InputError(f"the model takes batches of {len(first[0])} alone, not of {batch}")
        batch = len(first[0])
    samples = np.arange(batch or 1) % len(first[0])
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()[samples])
            for name, tensor in zip(prepared.captured.input_names, first, strict=True)}
