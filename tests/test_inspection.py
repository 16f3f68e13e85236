"""Inspection: what is shown is what is in the file, for every site and everything left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import PLAIN, compiled, inputs, small_swin
from helpers import redraw, vit
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.errors import InputError, ModelFileError, RecipeError
from repquant_fx.inspection import Inspection, Row, inspect, inspect_file, inspect_model


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("small_swin", 4, 6).save(tmp_path_factory.mktemp("swin") / "m.onnx")


def test_every_site_with_what_the_file_computes_with(swin: Path) -> None:
    found, report = inspect_file(swin), compiled("small_swin", 4, 6).report
    rows = {row.site: row for row in found.rows}
    described = {site["name"]: (layer, site) for layer in report["layers"] for site in layer["inputs"]}
    assert rows.keys() == described.keys() and len(found.rows) == len(rows)
    for name, (layer, site) in described.items():
        row = rows[name]
        assert (row.bits, row.scale) == (
            site["bits"],
            pytest.approx(site["scale"], rel=1e-7),
        ) and row.rewritten == layer["rewritten"]
        assert row.zero_point == site.get("zero_point", site.get("zero_code")) and layer["path"] in row.layers
        assert row.weight_bits == ([layer["weight"]["bits"]] if "weight" in layer else [])
    assert {row.kind for row in found.rows} == {
        "linear", "norm → linear", "affine → linear", "matmul", "softmax → matmul"}
    assert found.left_alone == [
        {key: item[key] for key in ("path", "operator", "reason")} for item in report["left_alone"]
    ]
    assert found.left_alone[0]["operator"] == "layer_norm"


def test_sizes_add_up(swin: Path) -> None:
    found, tensors = inspect_file(swin), onnx.load(str(swin)).graph.initializer
    about = found.about
    assert about["file_bytes"] == swin.stat().st_size
    # scalars are not raw
    assert about["quantized_bytes"] + about["other_bytes"] == sum(len(t.raw_data) or 1 for t in tensors)
    weights = [p for n, p in small_swin().named_parameters() if p.ndim in (2, 4) and "bias" not in n]
    assert about["quantized_parameters"] == sum(p.numel() for p in weights)
    qkv = next(row for row in found.rows if row.site.endswith("0.attn.qkv/input"))
    # 48x16 codes at 4 bits, 48 scales and int8 zero points, 48 int32 biases with 48 scales, a scale and a zero point of
    # the input, and of the output
    assert qkv.parameters == 768 and qkv.bytes == 384 + 48 * 5 + 2 * 48 * 4 + 2 * (4 + 1)
    assert qkv.bytes == sum(len(t.raw_data) or 1 for t in tensors if t.name.startswith("layers.0.blocks.0.attn.qkv."))


class Shared(nn.Module):
    """Three Linears behind one norm, a second norm that nothing suitable reads, and a softmax that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.softmax(self.last(self.q(h) + self.k(h) * self.v(h)), -1)


def test_layers_that_share_a_site_share_a_row_and_the_rest_has_reasons(tmp_path: Path) -> None:
    model, x = redraw(Shared()), torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(wbits=4, layers=(), **PLAIN)
    planned = inspect_model(model, recipe, example_inputs=(x,))
    found = inspect_file(compile(model, x, recipe, example_inputs=(x,)).save(tmp_path / "m.onnx"))
    for each in (planned, found):
        (row,) = each.rows
        assert row.layers == ["q", "k", "v"] and row.weight_bits == [4, 4, 4] and row.parameters == 192
        assert {(item["operator"], item["path"]) for item in each.left_alone} == {
            ("layer_norm", "last"),
            ("softmax", "softmax_int"),
        } or {item["operator"] for item in each.left_alone} == {"layer_norm", "softmax"}
        assert all(item["reason"] for item in each.left_alone)
    assert not planned.compiled and found.compiled and planned.rows[0].scale is None


def test_channelwise_scales_are_lists(tmp_path: Path) -> None:
    result = compiled("vit", 8, norm="channelwise")
    found = inspect_file(result.save(tmp_path / "m.onnx"))
    qkv = next(row for row in found.rows if row.site == "blocks.0.attn.qkv/input")
    assert (
        isinstance(qkv.scale, list)
        and len(qkv.scale) == 32
        and isinstance(qkv.zero_point, list)
        and qkv.grid == "uniform per channel"
    )


def test_the_plan_of_a_model_matches_what_compiling_does(swin: Path) -> None:
    planned, found = inspect_model(small_swin(), Recipe(wbits=4, abits=6, **PLAIN)), inspect_file(swin)
    assert [(r.site, r.kind, r.bits, r.weight_bits, r.parameters, r.layers) for r in planned.rows] == \
        [(r.site, r.kind, r.bits, r.weight_bits, r.parameters, r.layers) for r in found.rows]
    assert [item["path"] for item in planned.left_alone] == [item["path"] for item in found.left_alone]


def test_a_module_in_memory_keeps_its_mode() -> None:
    model = small_swin().train()
    model.get_submodule("layers.0").eval()
    modes = [m.training for m in model.modules()]
    inspect_model(model)
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes


def test_the_record_is_small_and_makes_no_difference_between_runs(swin: Path) -> None:
    model = onnx.load(str(swin))
    (kept,) = (p.value for p in model.metadata_props if p.key == "repquant_fx.layers")
    assert len(kept) < 400 * len(inspect_file(swin).rows)
    again = compile(small_swin(), inputs("small_swin"), Recipe(wbits=4, abits=6, **PLAIN), batch_size=8)
    assert again.to_bytes() == swin.read_bytes()


# ---- ONNX Runtime's view ---------------------------------------------------------------------------------------------


def with_audit(monkeypatch: pytest.MonkeyPatch, products: list[Any] | None) -> None:
    module = ModuleType("repquant_fx.audit")
    if products is not None:
        module.audit = lambda model, runtime: products  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "repquant_fx.audit", module if products is not None else None)


def row_of(found: Inspection, site: str) -> Row:
    return next(row for row in found.rows if row.site.endswith(site))


def test_without_an_audit_nothing_is_claimed(swin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_audit(monkeypatch, None)
    found = inspect_file(swin)
    assert {row.integer for row in found.rows} == {None} and found.about["integer_sites"] is None


def test_products_belong_to_their_layers_in_order(swin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(path: str, integer: bool = True, reason: str = "") -> SimpleNamespace:
        return SimpleNamespace(path=path, op="MatMul", integer=integer, reason=reason)

    at = "layers.0.blocks.0.attn"
    with_audit(
        monkeypatch,
        [
            product(f"{at}.qkv"),
            product(at),
            product(at, False, "float softmax"),
            product("layers.0.blocks.1.attn", False, "odd"),
            product("elsewhere", False),
        ],
    )
    found = inspect_file(swin)
    assert row_of(found, "0.attn.qkv/input").integer is True
    assert row_of(found, "blocks.0.attn/query").integer is True
    assert (
        row_of(found, "blocks.0.attn/value").integer is False
        and row_of(found, "blocks.0.attn/value").reason == "float softmax"
    )
    # fewer products: none is claimed
    assert {row_of(found, f"blocks.1.attn/{name}").integer for name in ("key", "probabilities")} == {False}
    assert row_of(found, "head.fc/input").integer is None and found.about["integer_sites"] == 3


def test_the_real_audit(swin: Path) -> None:
    from repquant_fx.audit import audit

    found, products = inspect_file(swin), {product.path: product for product in audit(swin)}
    for row in found.rows:
        assert row.integer is not None
        if row.weight_bits:
            assert row.integer == products[row.layers[0]].integer and row.reason == products[row.layers[0]].reason
    assert row_of(found, "blocks.0.attn/key").integer and "logarithmic" in row_of(found, "blocks.0.attn/value").reason


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_files_of_others(tmp_path: Path, swin: Path) -> None:
    model = onnx.load(str(swin))
    for keep, words in (((), "not written by repquant-fx"), (("repquant_fx.version",), "no readable record")):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        del other.metadata_props[:]
        onnx.helper.set_model_props(other, {p.key: p.value for p in model.metadata_props if p.key in keep})
        onnx.save(other, str(tmp_path / "other.onnx"))
        with pytest.raises(ModelFileError, match=words):
            inspect_file(tmp_path / "other.onnx")
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            Recipe.from_file(tmp_path / "other.onnx")
    (tmp_path / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(400))
    for name in ("noise.onnx", "missing.onnx"):
        with pytest.raises(ModelFileError, match=name):
            inspect_file(tmp_path / name)


def test_a_recipe_for_a_file_that_has_its_own(swin: Path) -> None:
    with pytest.raises(InputError, match="holds its recipe"):
        inspect(str(swin), Recipe(wbits=3))


def test_the_stored_recipe_gives_the_same_file(swin: Path) -> None:
    recipe = Recipe.from_file(swin)
    assert recipe == Recipe(wbits=4, abits=6, **PLAIN)
    assert compile(vit(depth=1), None, recipe, samples=8).report["recipe"] == recipe.to_dict()
