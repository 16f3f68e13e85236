"""Names out of files: what is a name passes, what is code is refused and shown escaped."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.loading import load_model
from repquant_fx.security.names import check_calls, check_module_names, check_names

CODE = '"+str(getattr(__import__("os"),"system")("touch RAN"))+"'


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.weight", "0", "größe", "_x", "__x", "p_layer_1", "class", "trunk.block1-0.f"]
)
def test_names_pass(name: str) -> None:
    check_names([name], "m.pt")


@pytest.mark.parametrize(
    "name",
    [
        CODE,
        "",
        "a..b",
        "a.",
        "a b",
        "a-(b)",
        "a-é",
        "__a-b__",
        "__class__",
        "a.__dict__.b",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "x" * 2000,
        "1a",
        "²",
        "a(",
        3,
        None,
    ],
    ids=ascii,
)
def test_what_is_no_name_is_refused_and_shown_escaped(name: str) -> None:
    with pytest.raises(ModelFileError, match="is not a name") as caught:
        check_names(["a", name], "m.pt")
    assert str(caught.value).isascii() and str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_names_in_a_module_wherever_they_are() -> None:
    shared, module = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    for child in (shared, module):
        child._buffers["mask"] = torch.ones(1)
    module._modules["a"] = module._modules["b"] = shared
    check_module_names(module, "m.pt")
    for names in (module._modules, shared._parameters, shared._buffers):
        names[CODE] = None  # type: ignore[index]
        with pytest.raises(ModelFileError, match="is not a name"):
            check_module_names(module, "m.pt")
        del names[CODE]
    module._modules["a.b"] = shared
    with pytest.raises(ModelFileError, match="no dot"):
        check_module_names(module, "m.pt")
    del module._modules["a.b"]
    module._modules[CODE] = shared  # a second name of a module that has one
    with pytest.raises(ModelFileError, match="is not a name"):
        check_module_names(module, "m.pt")


def test_a_hyphen_is_quoted_where_torch_writes_source(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("block1-0", nn.Conv2d(3, 4, 4))
    torch.save(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", input_shape=(3, 8, 8)).module
    assert loaded is not None
    traced = torch.fx.symbolic_trace(loaded)
    assert 'getattr(self, "block1-0")' in traced.code
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(traced(x), model.eval()(x))


def test_a_word_of_python_is_no_name_of_a_module() -> None:
    model = nn.Sequential()
    model.add_module("lambda", nn.ReLU())
    with pytest.raises(ModelFileError, match="called lambda, a word of Python; rename it"):
        check_module_names(model, "m.pt")


def test_names_are_found_although_a_file_hides_the_methods() -> None:
    model = nn.Sequential(nn.ReLU())
    model._modules[CODE] = nn.ReLU()
    vars(model)["modules"] = vars(model)["named_modules"] = lambda *_: []
    with pytest.raises(ModelFileError, match="is not a name"):
        check_module_names(model, "m.pt")
    hidden = nn.Sequential()
    hidden._modules = OrderedDict()  # type: ignore[assignment]
    vars(hidden._modules)["values"] = lambda: []
    with pytest.raises(ModelFileError, match="without a plain dict _modules"):
        check_module_names(nn.Sequential(hidden), "m.pt")


def test_names_of_weights(tmp_path: Path) -> None:
    save_file({CODE: torch.ones(1)}, tmp_path / "m.safetensors")
    torch.save({"state_dict": {CODE: torch.ones(1)}}, tmp_path / "m.pt")
    for file in ("m.safetensors", "m.pt"):
        with pytest.raises(ModelFileError, match="is not a name"):
            load_model(tmp_path / file, arch="timm:vit_tiny_patch16_224")


def test_names_of_a_pickled_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 4))
    model._modules[CODE] = model._modules.pop("0")
    torch.save(model, "m.pt")
    with pytest.raises(ModelFileError, match="is not a name"):
        load_model("m.pt", input_shape=(3, 8, 8))
    assert not Path("RAN").exists()


def test_layers_that_double_at_each_level_and_a_module_inside_itself() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(10):
        model = nn.Sequential(model, model)
    check_calls(model, "m.pt")  # a model may use a layer often
    for _ in range(10):
        model = nn.Sequential(model, model)
    with pytest.raises(ModelFileError, match="on more than 100000 ways"):
        check_calls(model, "m.pt")
    loop = nn.Sequential(nn.ReLU())
    loop._modules["1"] = loop
    with pytest.raises(ModelFileError, match="inside itself"):
        check_calls(loop, "m.pt")
