"""Recipes as text: what is written is read back, and the schema accepts what the parser accepts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx.errors import RecipeError
from repquant_fx.recipe import CHOICES, EQUALIZE, PRESETS, LayerRule, Recipe
from repquant_fx.recipe_settings import settings_of
from repquant_fx.recipe_text import FORMATS, descriptions, schema, write

BITS = st.integers(2, 8)
RULES = st.builds(
    LayerRule,
    st.text("ab.*[]\"'\\:#{}-é", min_size=1),
    st.none() | BITS,
    st.none() | BITS,
    st.none() | st.booleans(),
    st.none() | st.booleans(),
)
RECIPES = st.builds(
    Recipe,
    wbits=BITS,
    abits=BITS,
    input_bits=BITS,
    percentile=st.floats(50, 100),
    gptq_damping=st.floats(0, 10),
    gptq_block=st.integers(1, 4096),
    correction=st.booleans(),
    gptq=st.booleans(),
    gptq_activation_order=st.booleans(),
    equalize=st.lists(st.sampled_from(EQUALIZE)),
    layers=st.lists(RULES, max_size=3).map(tuple),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
)


@pytest.mark.parametrize("form", FORMATS)
@given(recipe=RECIPES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(form: str, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / f"r.{form}"
    path.write_text(write(recipe, form), encoding="utf-8")
    assert Recipe.from_file(path) == recipe


def test_every_setting_is_described_and_written(tmp_path: Path) -> None:
    for cls in (Recipe, LayerRule):
        words = descriptions(cls)
        assert set(words) == {f.name for f in fields(cls)} and all(len(w) > 10 for w in words.values())
    for form in FORMATS:
        text = write(Recipe(), form)
        for f in fields(Recipe):
            assert f"\n{f.name}:" in text or f"\n{f.name} =" in text or (f.name, form) == ("layers", "toml")
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("preset", PRESETS)
def test_the_schema_is_a_schema_and_accepts_presets(preset: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(PRESETS[preset](4, 4).to_dict(), schema(), jsonschema.Draft202012Validator)
    jsonschema.validate({}, schema(), jsonschema.Draft202012Validator)


VALUES: Any = (
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.floats(0, 200)
    | st.sampled_from(
        [
            "",
            "search",
            "log2",
            "values",
            [],
            ["values"],
            ["linear", "x"],
            [{"match": "a"}],
            [{"match": "a", "wbits": 4, "skip": None}],
            [{"wbits": 4}],
            [{"match": "a", "abits": 9}],
            [{"match": "a", "bits": 4}],
            [{"match": 3}],
            {},
        ]
    )
)


@given(data=st.dictionaries(st.sampled_from([*(f.name for f in fields(Recipe)), "wbit", "Layers"]), VALUES, max_size=3))
@settings(max_examples=300, deadline=None)
def test_the_schema_accepts_what_the_parser_accepts(data: dict[str, Any]) -> None:
    accepted = jsonschema.Draft202012Validator(schema()).is_valid(data)
    # 4.0 is an integer to JSON and no integer to Python
    whole = any(isinstance(v, float) and v.is_integer() for v in data.values())
    try:
        Recipe.from_dict(data)
    except RecipeError:
        assert not accepted or whole, data
    else:
        assert accepted, data


def test_one_field_tells_all_what_a_setting_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    """The check, the schema, the comments and the help of the command line."""
    from repquant_fx.cli import main

    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    told = "".join(capsys.readouterr().out.split())  # without the breaks of lines, which fall at hyphens, too
    for name, limits in settings_of(Recipe).items():
        above = write(Recipe()).partition(f"\n{name}:")[0].rpartition("\n\n")[2]
        written = " ".join(line.removeprefix("#").strip() for line in above.splitlines())
        assert written.endswith(limits.allowed()) and limits.schema().items() <= schema()["properties"][name].items()
        switch = told.partition(f"--{name.replace('_', '-')}")[2]
        assert "".join(descriptions(Recipe)[name].replace("`", "").split()) in switch
    for name, value, reason in (
        ("wbits", 9, "wbits must be an integer from 2 to 8; found 9"),
        ("gptq_block", 0, "an integer of at least 1"),
        ("norm", "layerwize", "did you mean 'layerwise'"),
        ("equalize", ["x"], "a list of values, linear, keys, query_key, or"),
        ("gptq_damping", 11, "a number from 0 to 10"),
        ("correction", 1, "correction must be true or false"),
    ):
        with pytest.raises(RecipeError, match=reason):
            Recipe(**{name: value})
