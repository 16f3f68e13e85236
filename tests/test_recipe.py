"""Recipes: strict, the same in YAML and TOML, and written back as they were read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repquant_fx.errors import RecipeError
from repquant_fx.recipe import CHOICES, PRESETS, LayerPlan, LayerRule, Recipe, repq_vit

YAML = """
wbits: 4
abits: 6
clipping: adam
percentile: 99.9
correction: false
layers:
  - {match: "head", wbits: 8, abits: 8}
  - {match: "blocks.*.mlp.fc2", abits: 7, gptq: false}
"""
TOML = """
wbits = 4
abits = 6
clipping = "adam"
percentile = 99.9
correction = false
[[layers]]
match = "head"
wbits = 8
abits = 8
[[layers]]
match = "blocks.*.mlp.fc2"
abits = 7
gptq = false
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_yaml_equals_toml(tmp_path: Path) -> None:
    expected = Recipe(wbits=4, abits=6, clipping="adam", percentile=99.9, correction=False,
                      layers=(LayerRule("head", 8, 8), LayerRule("blocks.*.mlp.fc2", abits=7, gptq=False)))
    for name, text in (("r.yaml", YAML), ("r.yml", YAML), ("r.toml", TOML), ("R.TOML", TOML)):
        assert Recipe.from_file(written(tmp_path, name, text)) == expected


def test_empty_files_are_the_defaults(tmp_path: Path) -> None:
    assert (
        Recipe.from_file(written(tmp_path, "r.yaml", ""))
        == Recipe.from_file(written(tmp_path, "r.toml", ""))
        == Recipe()
    )


@pytest.mark.parametrize("name, text, message", [
    ("r.yaml", "wbit: 4", "unknown setting 'wbit'; did you mean 'wbits'"),
    ("r.yaml", "cliping: none", "did you mean 'clipping'"),
    ("r.yaml", "layers: [{match: head, abit: 4}]", r"layers\[0\]: unknown setting 'abit'; did you mean 'abits'"),
    ("r.yaml", "layers: [{wbits: 4}]", r"layers\[0\] needs `match`"),
    ("r.yaml", "layers: {match: head}", "layers must be a list"),
    ("r.yaml", "layers: [head]", "must be a table"),
    ("r.yaml", "clipping: serch", "clipping must be one of .* did you mean 'search'"),
    ("r.yaml", "- wbits", "must be a table of settings, not a list"),
    ("r.yaml", "wbits: [4", "not valid YAML"),
    ("r.toml", "wbits = ", "not valid TOML"),
    ("r.toml", "wbits = '4'", "wbits must be an integer from 2 to 8"),
    ("r.json", "{}", "recipe is .yaml, .yml, .toml, or an exported .onnx"),
    ("r.yaml", "zzz: 1", "unknown setting 'zzz'$"),
])
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(written(tmp_path, name, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.from_file(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.from_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["wbits", "abits", "input_bits"])
@pytest.mark.parametrize("value", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_out_of_range(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{name} must be an integer from 2 to 8"):
        Recipe.from_dict({name: value})


@pytest.mark.parametrize("rule", [{"wbits": 1}, {"abits": 16}, {"wbits": False}])
def test_bits_of_rules_out_of_range(rule: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"layers\[0\]\.[wa]bits must be an integer"):
        Recipe.from_dict({"layers": [{"match": "*", **rule}]})


@pytest.mark.parametrize(
    "changes",
    [
        {"percentile": 20},
        {"percentile": True},
        {"percentile": "99"},
        {"gptq": 1},
        {"correction": "no"},
        {"gptq_damping": -0.1},
        {"gptq_block": 0},
        {"gptq_block": 2.5},
        {"gptq_activation_order": None},
        {"norm": None},
        {"percentile": float("nan")},
    ],
)
def test_values_of_the_wrong_kind(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changes))):
        Recipe.from_dict(changes)


@pytest.mark.parametrize("rule", [{"gptq": "no"}, {"skip": 1}, {"skip": "false"}])
def test_rule_switches_of_the_wrong_kind(rule: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"layers\[0\]"):
        Recipe.from_dict({"layers": [{"match": "*", **rule}]})


def test_the_last_matching_rule_wins_field_by_field() -> None:
    recipe = Recipe(
        wbits=4,
        abits=5,
        layers=(
            LayerRule("blocks.*", wbits=6, abits=6),
            LayerRule("blocks.1.*", wbits=8, skip=True),
            LayerRule("*.fc2", gptq=False, skip=False),
        ),
    )
    assert recipe.layer("head") == LayerPlan(4, 5, True, False)
    assert recipe.layer("blocks.0.fc1") == LayerPlan(6, 6, True, False)
    assert recipe.layer("blocks.1.fc1") == LayerPlan(8, 6, True, True)
    assert recipe.layer("blocks.1.fc2") == LayerPlan(8, 6, False, False)
    assert recipe.layer("BLOCKS.1.fc1") == LayerPlan(4, 5, True, False)  # paths have case


def test_presets() -> None:
    old = repq_vit(4, 6, softmax="log2")
    assert (old.wbits, old.abits, old.softmax) == (4, 6, "log2")
    assert not old.gptq and not old.correction and old.clipping == "none" and old.norm == "reparameterize"
    assert PRESETS["repquant"](4, 4) == Recipe(wbits=4, abits=4)


bits = st.integers(2, 8)
optional_bits = st.none() | bits
optional = st.none() | st.booleans()
rules = st.builds(
    LayerRule,
    match=st.text(min_size=1, max_size=12),
    wbits=optional_bits,
    abits=optional_bits,
    gptq=optional,
    skip=optional,
)
recipes = st.builds(
    Recipe,
    wbits=bits,
    abits=bits,
    input_bits=bits,
    percentile=st.floats(50, 100),
    correction=st.booleans(),
    gptq=st.booleans(),
    gptq_damping=st.floats(0, 10),
    gptq_block=st.integers(1, 512),
    gptq_activation_order=st.booleans(),
    layers=st.lists(rules, max_size=4).map(tuple),
    **{name: st.sampled_from(allowed) for name, allowed in CHOICES.items()},
)


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_round_trip(recipe: Recipe) -> None:
    import json

    import yaml

    data = recipe.to_dict()
    assert Recipe.from_dict(data) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(data))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(data))) == recipe


@pytest.mark.parametrize(
    "text",
    ["wbits: 4\nabits: 4\nwbits: 8\n", "layers:\n  - {match: a, wbits: 4, match: b}\n", "a: {b: 1}\na: {b: 1}\n"],
)
def test_a_key_twice_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="is set twice"):
        Recipe.from_file(tmp_path / "r.yaml")


def test_the_same_key_in_two_tables(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("layers:\n  - {match: a, wbits: 4}\n  - {match: b, wbits: 4}\nwbits: 3\n")
    assert [rule.match for rule in Recipe.from_file(tmp_path / "r.yaml").layers] == ["a", "b"]


def test_however_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("wbits: 3\n")
    for form in (Recipe(wbits=3), {"wbits": 3}, tmp_path / "r.yaml", str(tmp_path / "r.yaml")):
        assert Recipe.of(form) == Recipe(wbits=3)
    assert Recipe.of(None) == Recipe()
    with pytest.raises(RecipeError, match="found int"):
        Recipe.of(3)  # type: ignore[arg-type]


def test_rules_that_fit_nothing_are_named() -> None:
    recipe = Recipe(layers=(LayerRule("blocks.*.mpl.fc2", wbits=4), LayerRule("head", wbits=4)))
    assert recipe.unmatched(["blocks.0.mlp.fc2", "head"]) == [
        "layers[0]: 'blocks.*.mpl.fc2' matches no layer; did you mean 'blocks.0.mlp.fc2'?"
    ]


def test_a_setting_is_read_under_its_former_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("absorb: [query_key]\n")
    assert Recipe.from_file(tmp_path / "r.yaml") == Recipe(equalize=("query_key",))
    (tmp_path / "r.yaml").write_text("absorb: []\nequalize: []\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: 'absorb' is the former name of 'equalize'; give one of them"):
        Recipe.from_file(tmp_path / "r.yaml")


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("WBITS: 4\n")
    with pytest.raises(RecipeError, match=r"r\.yaml.*did you mean 'wbits'"):
        Recipe.from_file(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("wbits: 9\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: wbits must be"):
        Recipe.from_file(tmp_path / "r.yaml")
