"""The parameters of a compile: flat for people, in three objects inside, the same in both."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

from repquant_fx import compile, evaluation
from repquant_fx.options import Calibration, Evaluation, Run, Source, from_keywords
from repquant_fx.sensitivity import search, sensitivity

RENAMED = {"data": "calibration"}


def test_every_option_is_an_argument_with_the_same_default() -> None:
    arguments = inspect.signature(compile).parameters
    options = [field for each in (Source, Calibration, Run) for field in fields(each)]
    named = [(RENAMED.get(field.name, field.name), field) for field in options]
    assert sorted([*(name for name, _ in named), "recipe"]) == sorted(arguments)  # and each has one place
    for name, field in named:
        assert name == "model" or arguments[name].default == field.default, name
        described = [line.partition(":")[0] for line in (inspect.getdoc(compile) or "").splitlines() if ":" in line]
        assert any(name in names.replace(" ", "").split(",") for names in described), name


def test_flat_arguments_arrive_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument of `compile` under its own name: none is swapped with another."""
    from repquant_fx import compiler

    given: list[object] = []
    monkeypatch.setattr(compiler, "compile_model", lambda *objects: given.extend(objects))
    arguments = {name: f"the {name}" for name in inspect.signature(compile).parameters}
    compile(**arguments)  # type: ignore[arg-type]
    source, calibration, recipe, run = given
    assert recipe == "the recipe"
    for each in (source, calibration, run):
        for name, value in vars(each).items():
            assert value == f"the {RENAMED.get(name, name)}"


def test_an_evaluation_has_the_arguments_of_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(evaluation, "measure", lambda *objects: given.extend(objects))
    names = inspect.signature(evaluation.evaluate).parameters
    evaluation.evaluate(**{name: f"the {name}" for name in names})  # type: ignore[arg-type]
    source, how = given
    assert source == Source("the source", "the arch", allow_pickle="the allow_pickle")  # type: ignore[arg-type]
    assert how == Evaluation(**{field.name: f"the {field.name}" for field in fields(Evaluation)})
    assert {*names} == {"source", "arch", "allow_pickle", *(field.name for field in fields(Evaluation))}
    assert all(names[field.name].default == field.default for field in fields(Evaluation) if field.name != "data")


def test_keywords_are_told_apart() -> None:
    model, data = object(), torch.zeros(2)
    source, calibration = from_keywords(model, data, {"arch": "timm:vit", "seed": 3, "offload_dir": "folder"})
    assert source == Source(model, arch="timm:vit", offload_dir="folder")
    assert calibration.data is data and calibration.seed == 3 and calibration.batch_size == Calibration().batch_size


@pytest.mark.parametrize("function", [sensitivity, search])
def test_an_option_of_a_compile_alone_is_refused(function) -> None:
    """What says where a compile works means nothing to an analysis."""
    more = {"target_size": "3b"} if function is search else {}
    with pytest.raises(TypeError, match="unexpected keyword argument 'work_dir'"):
        function(torch.nn.Linear(2, 2), torch.zeros(2, 2), work_dir="folder", **more)
