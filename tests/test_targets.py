"""The table of targets: what it says of a recipe, and what is refused."""

from __future__ import annotations

import json

import pytest
from compiled import compiled

from repquant_fx import Recipe
from repquant_fx.errors import InputError
from repquant_fx.recipe import LayerRule
from repquant_fx.targets import DEFAULT, HIGHEST_OPSET, LOWEST_OPSET, OPSET, RUNTIMES, TARGETS, find


def test_the_default_changes_nothing() -> None:
    assert find() is TARGETS[DEFAULT] and find().opset == OPSET and not find().inlined
    for recipe in (Recipe(), Recipe(container="int4", wbits=4), Recipe(layers=(LayerRule("head", wbits=8),))):
        assert find().recipe(recipe) == recipe


def test_the_default_file_is_what_it_was() -> None:
    """It says nothing of targets, so that files written before and now are the same."""
    proto = compiled("vit", 8).proto
    assert not any("target" in entry.key for entry in proto.metadata_props)
    assert [(e.domain, e.version) for e in proto.opset_import] == [("", 21), ("repquant_fx", 1)] and proto.functions
    assert proto.ir_version == 10


def test_rows_are_complete() -> None:
    for name, target in TARGETS.items():
        assert name == target.name and target.runtime in RUNTIMES and target.tested and target.containers
        assert json.loads(json.dumps(target.to_dict()))["name"] == name
        assert f"opset {target.opset}" in target.describe()


def test_weights_are_limited_where_sums_saturate() -> None:
    rules = (LayerRule("head", wbits=8, abits=8), LayerRule("fc*", wbits=4), LayerRule("norm", abits=6))
    recipe = find("ort-cpu-avx2").recipe(Recipe(layers=rules))
    assert recipe.wbits == 7 and [rule.wbits for rule in recipe.layers] == [7, 4, None]
    assert recipe.abits == 8 and [rule.abits for rule in recipe.layers] == [8, None, 6]
    assert find("ort-cpu-avx2").recipe(Recipe(wbits=4)).wbits == 4


def test_the_container_is_the_targets() -> None:
    assert find("int4").recipe(Recipe()).container == "int4"
    assert find("onnx").recipe(Recipe(container="int4")).container == "int4"
    with pytest.raises(InputError, match="openvino takes no container int4"):
        find("openvino").recipe(Recipe(container="int4"))


@pytest.mark.parametrize("name, opset, words", [
    ("openvinno", None, "did you mean 'openvino'"),
    (DEFAULT, LOWEST_OPSET - 1, "from 17 to 27"),
    ("onnx", HIGHEST_OPSET + 1, "from 17 to 27"),
])
def test_what_there_is_not(name: str, opset: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find(name, opset)
    assert find("onnx", 18).opset == 18 and TARGETS["onnx"].opset == OPSET
