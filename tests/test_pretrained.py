"""A model by name, compiled, called like the one that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled import PLAIN
from helpers import images, relative
from language import save
from pictures import ARCH

import repquant_fx
from repquant_fx import InputError, Recipe
from repquant_fx.compiled_module import CompiledModule, Outputs
from repquant_fx.pretrained import with_weights

RECIPE = Recipe(**PLAIN)


def test_a_timm_model_in_one_line(tmp_path: Path) -> None:
    model = repquant_fx.from_pretrained(f"{ARCH},pretrained=False", images(24), RECIPE, threads=1)
    x = images(5, seed=2)
    with torch.no_grad():
        assert 0 < relative(model(x), model.original(x)) < 0.2
    assert model.num_classes == 5 and model.compiled is not None
    path = model.save_pretrained(tmp_path / "vit")
    assert path == tmp_path / "vit/model.onnx" and (tmp_path / "vit/config.json").is_file()
    again = CompiledModule(model.original, path)
    assert torch.equal(again(x), model(x)) and again.compiled is None
    with pytest.raises(InputError, match="written already"):
        again.save_pretrained(tmp_path / "other")


def test_published_weights_are_meant_unless_it_says_otherwise() -> None:
    assert with_weights("timm:vit_tiny") == "timm:vit_tiny,pretrained"
    assert with_weights("timm:vit_tiny,depth=2") == "timm:vit_tiny,depth=2,pretrained"
    overlay = "timm:vit_tiny,pretrained_cfg_overlay={'mean': (0, 0, 0)}"
    assert with_weights(overlay) == f"{overlay},pretrained"
    for said in ("timm:vit_tiny,pretrained", "timm:vit_tiny, pretrained=False,depth=2", "path/to/bert", "hf:a/b"):
        assert with_weights(said) == said


def test_a_transformers_model_gives_outputs_by_name(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert", with_tokenizer=True)
    ids = torch.randint(3, 80, (24, 12), generator=torch.Generator().manual_seed(0))
    model = repquant_fx.from_pretrained(str(tmp_path / "bert"), {"input_ids": ids}, RECIPE, task="text-classification")
    with torch.no_grad():
        expected = model.original(input_ids=ids[:4]).logits
    assert relative(model(input_ids=ids[:4]).logits, expected) < 0.3
    assert torch.equal(model(ids[:4], torch.ones_like(ids[:4])).logits, model(input_ids=ids[:4]).logits)
    assert model.config.model_type == "bert"


def test_outputs_are_named() -> None:
    found = Outputs(logits=torch.zeros(1))
    assert found.logits is found["logits"]
    with pytest.raises(AttributeError, match="gives logits, but no loss"):
        found.loss  # noqa: B018


def test_a_program_is_no_module(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(InputError, match="use compile and its session"):
        repquant_fx.from_pretrained(str(tmp_path / "m.pt2"), torch.randn(8, 4), RECIPE)
