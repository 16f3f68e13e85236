"""Rotations in a whole compile: tried on data, made where they pay, the same with a checkpoint; and the matrices
themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled import PLAIN
from helpers import plant, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.errors import RecipeError
from repquant_fx.quantizers.rotation import rotation
from repquant_fx.recipe import LayerRule


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 48), st.integers(0, 2**31), st.booleans())
def test_matrices_are_orthogonal_and_fix_ones_where_asked(size: int, seed: int, ones: bool) -> None:
    matrix = rotation(size, seed, ones=ones)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-10)
    assert torch.equal(matrix, rotation(size, seed, ones=ones))
    if ones:
        assert torch.allclose(matrix.sum(0), torch.ones(size, dtype=torch.float64), atol=1e-10)


def test_a_rotated_vector_has_its_layer_norm_rotated() -> None:
    x, matrix = torch.randn(7, 24, dtype=torch.float64), rotation(24, 3, ones=True)
    norm = nn.functional.layer_norm
    assert torch.allclose(norm(x @ matrix, [24]), norm(x, [24]) @ matrix, atol=1e-10)


def outliers(seed: int = 0) -> nn.Module:
    """A ViT whose residual stream has two channels far larger than the others."""
    model = vit(2, seed)
    with torch.no_grad():
        for tensor in (model.pos_embed, model.cls_token):
            tensor[..., :2] *= 40
    return model


IMAGES = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_compile_tries_and_rotates(tmp_path: Path) -> None:
    recipe = Recipe(wbits=4, abits=4, normalize_rows=False, rotate=("residual", "heads"))
    plain = compile(outliers(), IMAGES, replace(recipe, rotate=()), example_inputs=(IMAGES[:2],))
    first = compile(outliers(), IMAGES, recipe, example_inputs=(IMAGES[:2],), work_dir=tmp_path)
    again = compile(outliers(), IMAGES, recipe, example_inputs=(IMAGES[:2],), work_dir=tmp_path)
    tried = first.report["rotations"]
    assert {entry["kind"] for entry in tried} == {"residual", "heads"}
    assert any(entry["rotated"] for entry in tried)
    assert all(entry["rotated"] == (entry["rotated_sqnr_db"] > entry["sqnr_db"]) for entry in tried
               if entry["rotated_sqnr_db"] != entry["sqnr_db"])
    assert first.to_bytes() == again.to_bytes() != plain.to_bytes()
    assert "rotations" not in plain.report
    assert first.parity is not None
    first.parity.raise_on_problems()
    operators = [sorted(node.op_type for node in model.proto.graph.node) for model in (plain, first)]
    assert operators[0] == operators[1]


def test_planted_channels_of_a_norm_do_not_matter_to_it() -> None:
    """What a norm's gain does to channels is undone before a rotation is judged: gain and bias are folded first."""
    model = vit(2)
    plant(model.blocks[0].norm1, [model.blocks[0].attn.qkv])
    compiled = compile(model, IMAGES, Recipe(abits=4, rotate=("residual",)), example_inputs=(IMAGES[:2],))
    assert len(compiled.report["rotations"]) == 1


def test_eight_bits_are_enough_without() -> None:
    def entries(**settings: object) -> list[dict[str, object]]:
        recipe = Recipe(**{**PLAIN, "rotate": ("heads",), **settings})
        return compile(vit(2), IMAGES, recipe, example_inputs=(IMAGES[:2],)).report.get("rotations", [])

    assert entries() == []
    mixed = entries(layers=(LayerRule("blocks.0.*", abits=4),))
    assert {str(entry["path"])[:8]: "enough" in str(entry.get("reason")) for entry in mixed} == {
        "blocks.0": False, "blocks.1": True}


@pytest.mark.parametrize("wrong", ["residual", ("tokens",), 1])
def test_unknown_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(RecipeError, match="rotate"):
        Recipe(rotate=wrong)  # type: ignore[arg-type]
