"""The choice from made-up times, the forms of a matched model, the turns, and the glue with made-up compiles."""

from __future__ import annotations

import functools
import importlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import compiled
from compiled import inputs as model_inputs
from helpers import Block, Encoder, canonical, images, match, redraw, sequences, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx import LayerRule, Recipe, tune
from repquant_fx.compiler import compile_model
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.preparation import captured_once, prepare
from repquant_fx.preparation import match as match_recipe
from repquant_fx.runtime import session_options
from repquant_fx.tuning.candidates import Form, apply, candidates, families, merged
from repquant_fx.tuning.choose import KEPT, Speed, Trial, choose, lost, settle, together
from repquant_fx.tuning.conditions import Conditions
from repquant_fx.tuning.timing import runner, take_turns
from repquant_fx.tuning.tuner import inputs_of

CLEAR = Speed(1.2, 1.19, 1.21)
START = Recipe(layers=(LayerRule("blocks.*", wbits=8),))


def form(name: str, *about: str) -> Form:
    return Form(name, frozenset(about or {name}))


@st.composite
def trials_of(draw: st.DrawFn) -> list[Trial]:
    found = []
    for index in range(draw(st.integers(0, 7))):
        median, spread = draw(st.floats(0.5, 2)), draw(st.floats(0, 0.3))
        about = draw(st.sets(st.sampled_from("abcd"), min_size=1))
        found.append(Trial(form(f"form {index}", *about), Speed(median, median - spread / 2, median + spread / 2),
                           draw(st.one_of(st.floats(-10, 80), st.just(math.inf))), 1))
    return found


@settings(deadline=None, max_examples=40)
@given(trials_of(), st.floats(-5, 70), st.floats(0, 20), st.randoms(use_true_random=False))
def test_the_choice_keeps_to_the_floor_and_to_gains(
    trials: list[Trial], start: float, max_drop: float, chance: random.Random
) -> None:
    verdicts = choose(start, trials, max_drop)
    kept = [verdict.trial for verdict in verdicts if verdict.kept]
    assert [verdict.trial for verdict in verdicts] == trials and all(v.kept == (v.why == KEPT) for v in verdicts)
    assert all(trial.speed.gains and trial.speed.median > 1 for trial in kept)
    assert lost(start, together(start, [trial.sqnr_db for trial in kept])) <= max_drop + 1e-9
    decided = [name for trial in kept for name in trial.form.about]
    assert len(decided) == len(set(decided))
    mixed = chance.sample(trials, len(trials))
    assert {v.trial.form.name for v in choose(start, mixed, max_drop) if v.kept} == {t.form.name for t in kept}


@settings(deadline=None, max_examples=40)
@given(trials_of(), st.floats(0, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_result_is_never_below_the_floor_nor_slower(
    trials: list[Trial], max_drop: float, most: int, chance: random.Random
) -> None:
    """Whatever a combination turns out to be as a whole."""
    start, seen = 30.0, []

    def measure(forms: Any) -> tuple[Speed, float, int]:
        seen.append(forms)
        median, spread = chance.uniform(0.8, 1.3), chance.uniform(0, 0.2)
        return Speed(median, median - spread / 2, median + spread / 2), start - chance.uniform(-1, 4), 1

    attempts = settle(start, choose(start, trials, 100.0), measure, max_drop, most)
    assert [attempt.forms for attempt in attempts] == seen and len(attempts) <= most
    for index, attempt in enumerate(attempts):
        good = lost(start, attempt.sqnr_db) <= max_drop and attempt.speed.gains
        assert attempt.accepted == good and (not good or attempt.speed.median > 1)
        assert index == len(attempts) - 1 or (not good and len(attempts[index + 1].forms) == len(attempt.forms) - 1)


def test_reasons() -> None:
    trials = [
        Trial(form("good"), CLEAR, 29.9, 1),
        Trial(form("same", "good"), Speed(1.1, 1.1, 1.1), 30.0, 1),
        Trial(form("noise"), Speed(1.1, 1.0, 1.2), 30.0, 1),
        Trial(form("slow"), Speed(0.8, 0.7, 0.9), 30.0, 1),
        Trial(form("costly"), Speed(1.3, 1.3, 1.3), 20.0, 1),
        Trial(form("too much"), Speed(1.05, 1.05, 1.05), 29.05, 1),
        Trial.failed(form("broken"), "it is refused"),
    ]
    why = {verdict.trial.form.name: verdict.why for verdict in choose(30.0, trials, 1.0)}
    assert why.pop("too much").startswith("with what is kept it would lose 1.")
    assert why == {"good": KEPT, "same": "good gains more", "noise": "no gain beyond noise", "slow": "slower",
                   "costly": "loses 10.00 dB", "broken": "it is refused"}


def test_what_loses_too_much_together_goes_one_by_one() -> None:
    trials = [Trial(form(name), CLEAR, sqnr, 1) for name, sqnr in (("a", 29.8), ("b", 29.5), ("c", 30.0))]

    def measure(forms: Any) -> tuple[Speed, float, int]:
        return CLEAR, 30.0 - 0.6 * len(forms), 1

    attempts = settle(30.0, choose(30.0, trials, 1.0), measure, 1.0, 9)
    assert [[f.name for f in attempt.forms] for attempt in attempts] == [["a", "b", "c"], ["a", "c"], ["c"]]
    assert [attempt.accepted for attempt in attempts] == [False, False, True]
    assert [a.accepted for a in settle(30.0, choose(30.0, trials, 1.0), measure, 1.0, 2)] == [False, False]

    def refusing(forms: Any) -> Any:
        return "all of it would be float" if len(forms) > 2 else (CLEAR, 30.0, 1)

    refused, accepted = settle(30.0, choose(30.0, trials, 1.0), refusing, 1.0, 2)
    assert refused.why == "all of it would be float" and not refused.accepted and accepted.accepted


def test_speed_is_of_pairs_of_turns() -> None:
    """What slows both down for a while leaves it; a single bad turn does, too."""
    start = [1.0, 3.0, 1.0, 2.0, 50.0]
    assert Speed.of(start, [x / 1.25 for x in start[:4]] + [1.0]).median == pytest.approx(1.25)
    assert Speed.of([1.0, 1.1, 0.9], [1.0, 1.0, 1.0]).gains is False
    assert not Speed(1.009, 1.009, 1.009).gains and Speed(1.011, 1.011, 1.011).gains


def test_turns_alternate_and_are_medians() -> None:
    ran: list[str] = []
    now = [0.0]
    takes = {"a": 1.0, "b": 2.0}

    def run(name: str) -> Any:
        def once() -> None:
            ran.append(name)
            now[0] += takes[name] * (10 if len(ran) == 6 else 1)  # one run is disturbed
        return once

    times = take_turns([run("a"), run("b")], 12.0, turns=4, clock=lambda: now[0])
    assert times == [[1.0] * 4, [2.0] * 4]
    assert "".join(ran[4:]) == "aaa" + "bb" + "bb" + "aaa" + "aaa" + "bb" + "bb" + "aaa"


@pytest.mark.parametrize("threads", [None, 1])
@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_runner_runs_the_model_on_its_own_inputs(runtime: str, threads: int | None) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "twice", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    run = runner(OnnxModel.of(model), runtime, {"x": given, "other": given}, threads)
    found: Any = [run() for _ in range(2)][1]
    assert np.array_equal(found[0], 2 * given)


def test_threads_of_a_session_sleep_where_they_are_told_to() -> None:
    entry = "session.force_spinning_stop"
    assert session_options(2, spin=False).get_session_config_entry(entry) == "1"
    with pytest.raises(RuntimeError):  # there is none
        session_options(2).get_session_config_entry(entry)


# ---- forms -----------------------------------------------------------------------------------------------------------


@functools.cache
def graph_of_vit() -> Any:
    """Matching leaves it as it is."""
    return canonical(vit(depth=2), images(2))


def test_forms_of_a_transformer() -> None:
    graph, recipe = graph_of_vit(), Recipe()
    found = {each.name: each for each in candidates(match(graph, recipe), recipe)}
    layers = ["patch_embed.proj", "blocks.*.attn.qkv", "blocks.*.attn", "blocks.*.attn.proj", "blocks.*.mlp.fc1",
              "blocks.*.mlp.fc2", "head"]
    linears = [name for name in layers if name != "blocks.*.attn"]
    assert set(found) == {"softmax uniform", "symmetric on", "softmax uniform, symmetric on",
                          *(f"float {name}" for name in layers), *(f"weights alone {name}" for name in linears)}
    products = found["float blocks.*.attn"]
    assert products.rules == (LayerRule("blocks.*.attn", skip=True),) and products.about > {"softmax"}
    assert not found["float blocks.*.attn.qkv"].about & products.about
    plan = match(graph, apply(recipe, [found["float blocks.*.mlp.fc2"], found["weights alone head"]]))
    paths = {group.path for group in plan.groups}
    assert not any("fc2" in path for path in paths) and "blocks.1.attn" in paths
    fast = apply(recipe, [found["softmax uniform, symmetric on"]])
    assert (fast.softmax, fast.symmetric) == ("uniform", True)
    back = {each.name for each in candidates(match(graph, fast), fast)}
    assert {"softmax log", "symmetric off"} < back


def test_forms_leave_what_rules_and_the_recipe_settle() -> None:
    graph = graph_of_vit()
    recipe = Recipe(wbits=4, abits="none", layers=(LayerRule("blocks.*.mlp.fc*", wbits=8),))
    names = {each.name for each in candidates(match(graph, recipe), recipe)}
    assert names == {f"float {path}" for path in ("patch_embed.proj", "blocks.*.attn.qkv", "blocks.*.attn.proj",
                                                  "head")}
    few = Recipe(wbits=4, abits=4)
    assert "normalize_rows off" in {each.name for each in candidates(match(graph, few), few)}


def test_what_shares_an_element_is_one_set() -> None:
    assert merged([{1, 2}, {3}, set(), {4, 5}, {2, 4}]) == [{1, 2, 4, 5}, {3}]


class Odd(Encoder):
    """`blocks.*.q` would match `blocks.0.inner.q` as well."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks[1].inner = Block()

    def forward(self, x: Any) -> Any:
        x = self.blocks[1].inner(self.blocks(self.embed(x)))
        return self.head(self.norm(x).mean(1))


def test_globs_match_their_layers_alone_and_those_that_share_an_activation_are_one_family() -> None:
    found = {each.name: each.globs for each in families(match(canonical(redraw(Odd()), sequences(2))), Recipe())}
    assert found["blocks.*.proj"] == ("blocks.0.proj", "blocks.1.proj")
    assert found["blocks.1.inner.proj"] == ("blocks.1.inner.proj",) and found["head"] == ("head",)
    assert found["blocks.*.q, blocks.*.k, blocks.*.v"] == tuple(f"blocks.{n}.{each}" for each in "qkv" for n in (0, 1))


# ---- the whole way, on a machine that is made up -------------------------------------------------------------------


@functools.cache
def prepared() -> Any:
    return prepare(Source(vit(depth=1)), Calibration(images(16), batch_size=8), START)


class Machine:
    """Compiles nothing: speed and SQNR follow from the recipe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whole_drop: float = 0.5, whole_gain: float = 1.2) -> None:
        self.recipes: list[Recipe] = []
        self.whole_drop, self.whole_gain = whole_drop, whole_gain
        module = importlib.import_module("repquant_fx.tuning.tuner")
        monkeypatch.setattr(module, "captured_once", lambda source: source)
        monkeypatch.setattr(module, "prepare", lambda *given: prepared())
        monkeypatch.setattr(module, "compile_model", self.compile)
        monkeypatch.setattr(module, "runner", lambda model, runtime, inputs, threads: model.recipe)
        monkeypatch.setattr(module, "take_turns", self.turns)

    def compile(self, source: Any, calibration: Any, recipe: Recipe, run: Any) -> Any:
        self.recipes.append(recipe)
        if recipe.layer("head").skip:
            raise InputError("this runtime refuses it")
        uniform = recipe.softmax == "uniform"
        loss = (self.whole_drop if recipe.gptq else 0.4) if uniform else 0.0
        return SimpleNamespace(report={"output_sqnr_db": 30.0 - loss},
                               model=SimpleNamespace(size=lambda: 1000, recipe=recipe))

    def turns(self, runners: list[Recipe], seconds: float) -> list[list[float]]:
        start, other = runners
        gain = self.whole_gain if other.gptq else 1.2
        assert start.gptq == other.gptq
        return [[1.0, 1.01, 1.0], [1 / gain if other.softmax == "uniform" else 1.0] * 3]


def tuned(**options: Any) -> Any:
    return tune("model.pt2", "images/", START, **options)


def test_a_form_that_holds_up_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    found = tuned()
    assert found.recipe.softmax == "uniform" and found.recipe.gptq and not found.fallback
    assert found.recipe == apply(found.start, found.accepted.forms)
    assert [recipe.gptq for recipe in machine.recipes] == [False] * (len(machine.recipes) - 2) + [True, True]
    rows = found.table().splitlines()
    assert len(rows) == 2 + len(found.verdicts) and any("dropped: this runtime refuses it" in row for row in rows)
    assert found.verdict in found.to_text() and "29.5 dB instead of 30.0" in found.verdict
    assert found.to_text().startswith("# Chosen by `repquant-fx tune` for target ort-cpu, batch 1.\n")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["batch"] == 1 and data["max_drop"] == 1.0 and data["attempts"][0]["accepted"]


@pytest.mark.parametrize(("changes", "reason"), [({"whole_drop": 1.5}, "loses 1.50 dB"),
                                                 ({"whole_gain": 1.0}, "no gain beyond noise")])
def test_what_does_not_hold_up_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, float], reason: str
) -> None:
    Machine(monkeypatch, **changes)
    with pytest.warns(RepQuantWarning, match="fell back to the start"):
        found = tuned()
    assert found.fallback and found.recipe == found.start and reason in found.verdict
    for form_ in ("yaml", "toml"):
        path = tmp_path / f"recipe.{form_}"
        path.write_text(found.to_text(form_))
        assert Recipe.from_file(path) == found.start


def test_a_floor_of_nothing_keeps_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    found = tuned(max_drop=0.0)
    assert found.recipe == found.start and not found.fallback and "the start stays" in found.verdict
    assert not any(recipe.gptq for recipe in machine.recipes)  # nothing to verify


@pytest.mark.parametrize(
    ("options", "words"),
    [({"target": "openvin"}, "did you mean 'openvino'"), ({"target": "onnx"}, "run elsewhere"),
     ({"threads": 0}, "threads"), ({"batch": True}, "batch"), ({"max_drop": -1.0}, "max_drop"),
     ({"max_drop": math.nan}, "max_drop"), ({"seconds": 0.0}, "seconds")])
def test_conditions_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Conditions(**options)


def test_one_capture_serves_many_compiles() -> None:
    source = captured_once(Source(vit()))
    match_recipe(source, Recipe(wbits=4, abits=4, softmax="uniform"))  # rewrites a copy
    wanted = compiled("vit", 8)
    again = compile_model(source, Calibration(model_inputs("vit"), batch_size=8), Recipe.from_dict(
        wanted.report["recipe"]), Run(check=False, with_past=False))
    assert again.to_bytes() == wanted.to_bytes()


def test_what_is_run_is_calibration_data() -> None:
    (name,) = prepared().captured.input_names
    first = prepared().data.batches[0][0].numpy()
    assert np.array_equal(inputs_of(prepared(), None)[name], first[:1])
    assert np.array_equal(inputs_of(prepared(), 11)[name], np.concatenate([first, first[:3]]))
    fixed = SimpleNamespace(captured=SimpleNamespace(dynamic_batch=False, input_names=[name]), data=prepared().data)
    assert len(inputs_of(fixed, None)[name]) == len(inputs_of(fixed, 8)[name]) == 8
    with pytest.raises(InputError, match="batches of 8 alone, not of 3"):
        inputs_of(fixed, 3)


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repquant_fx.tuning.conditions.version", lambda runtime: None)
    with pytest.raises(InputError, match="OpenVINO is not installed: pip install openvino"):
        Conditions("openvino")


def test_data_is_needed_and_more_than_once() -> None:
    with pytest.raises(InputError, match="--calib"):
        tune("no-such-file.pt2")
    with pytest.raises(InputError, match="but once"):
        tune("no-such-file.pt2", iter([np.zeros(1)]))
