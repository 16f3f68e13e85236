"""Derived names: read back as they were spelled, never one for two things."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor, nn

from repquant_fx import Recipe, compile, naming
from repquant_fx.compiled import CompiledModel
from repquant_fx.naming import DERIVED, SCALE, Names
from repquant_fx.passes.base import add_tensor, free_stem
from repquant_fx.recipe import LayerRule

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Modules one after the other, under any names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def compiled(model: nn.Module, wbits: int = 8) -> CompiledModel:
    """Compiled with the parity check, which raises where the file differs."""
    return compile(model, [X], Recipe(wbits=wbits, **PLAIN), example_inputs=[X[:2]])


@given(st.lists(st.sampled_from(["a", "a_2", "a_3", "a_2_2", "b"]), max_size=12))
def test_names_are_handed_out_once(wanted: list[str]) -> None:
    names = Names(["b"])
    made = [names.unique(name) for name in wanted]
    assert len({*made, "b"}) == len(made) + 1
    assert all(name == made[0] or name in names for name in made)


@pytest.mark.parametrize("suffix", DERIVED)
def test_a_suffix_is_read_back(suffix: naming.Suffix) -> None:
    assert suffix.stem(suffix.of("fc.weight_2")) == "fc.weight_2"
    assert suffix.stem("fc.weight") is None


@pytest.mark.parametrize(
    "weight, bias",
    [
        ("fc.weight", "fc.bias"),
        ("fc.weight_t", "fc.bias"),
        ("fc.weight_2", "fc.bias"),
        ("in_proj_weight", "in_proj_bias"),
        ("weighted.w", "weighted.w_bias"),
        ("w", "w_bias"),
    ],
)
def test_what_belongs_beside_a_weight(weight: str, bias: str) -> None:
    assert naming.beside(weight, "bias") == bias


def test_a_site_and_its_stem() -> None:
    name = naming.site("blocks.0.fc", "input")
    assert (name, naming.site_operand(name), naming.site_stem(name)) == (
        "blocks.0.fc/input",
        "input",
        "blocks.0.fc.input",
    )


def test_numbers_go_to_the_stem() -> None:
    graph_module = torch.fx.symbolic_trace(Chain(fc=nn.Linear(4, 4)))
    assert free_stem(graph_module, "fc.input") == "fc.input"
    add_tensor(graph_module, "fc.input_zero_point", torch.zeros(()))
    stem = free_stem(graph_module, "fc.input")
    assert stem == "fc.input_2" and SCALE.stem(add_tensor(graph_module, SCALE.of(stem), torch.ones(()))) == stem


def test_a_path_through_a_tensor_leaves_the_tensor_alone() -> None:
    model = Chain(fc=nn.Linear(4, 4))
    model.register_buffer("linear", torch.ones(3))
    graph_module = torch.fx.symbolic_trace(model)
    graph_module.register_buffer("linear", model.linear)
    path = add_tensor(graph_module, "linear.input_scale", torch.ones(()))
    assert path == "linear_2.input_scale" and isinstance(graph_module.linear, Tensor)


def test_layers_whose_names_differ_in_a_dot() -> None:
    sites = compiled(Chain(fc=nn.Sequential(nn.Linear(4, 4)), fc_0=nn.Linear(4, 4))).quantizers
    assert set(sites) == {"fc.0/input", "fc_0/input"}


def test_a_layer_called_like_the_place_of_the_quantizers() -> None:
    assert set(compiled(Chain(quantizers=nn.Linear(4, 4))).quantizers) == {"quantizers/input"}


def test_a_weight_of_two_layers_keeps_readable_names() -> None:
    layer = nn.Linear(4, 4)
    names = {t.name for t in compiled(nn.Sequential(layer, nn.ReLU(), layer)).proto.graph.initializer}
    codes = [naming.QUANTIZED.stem(name) for name in names if "weight" in name and naming.QUANTIZED.stem(name)]
    assert len(codes) == 2 and all(SCALE.of(str(stem)) in names for stem in codes)


class Root(nn.Module):
    """A parameter of the root, under any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.fc = name, nn.Linear(4, 4)
        self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fc(x).tanh() * 3, getattr(self, self.name)) + 2 * x.mean(1, keepdim=True)


EXPORTER = ["val_0", "tmp_1", "const", "scalar_x", "linear", "_empty_0", "mul", "own"]


def of_four_bits(result: CompiledModel, *weights: str) -> bool:
    """Whether these are there under their names, and 4 bits stayed 4 bits."""
    types = {t.name: t.data_type for t in result.proto.graph.initializer}
    return all(types[naming.QUANTIZED.of(weight)] == TensorProto.INT4 for weight in weights)


@pytest.mark.parametrize("name", EXPORTER)
def test_parameters_with_names_that_the_exporter_gives_too(name: str) -> None:
    assert of_four_bits(compiled(Root(name), wbits=4), name, "fc.weight")


def test_layers_with_names_that_the_exporter_gives_too() -> None:
    result = compiled(Chain(**{name: nn.Linear(4, 4) for name in EXPORTER}), wbits=4)
    assert of_four_bits(result, *(f"{name}.weight" for name in EXPORTER))
    assert set(result.quantizers) == {f"{name}/input" for name in EXPORTER}


def test_an_input_called_like_a_constant_of_the_exporter() -> None:
    class Model(Chain):
        def forward(self, val_0: Tensor) -> Tensor:
            return super().forward(val_0 * 2.5)

    proto = compiled(Model(fc=nn.Linear(4, 4))).proto
    assert [i.name for i in proto.graph.input] == ["val_0"] and "val_0" not in {t.name for t in proto.graph.initializer}


@pytest.mark.parametrize("name", ["_fc", "__fc", "_empty_1"])
def test_a_rule_finds_a_name_with_a_leading_underscore(name: str) -> None:
    model = Chain(**{name: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "b": nn.Linear(4, 4)})
    recipe = Recipe(layers=(LayerRule(f"{name}.*", skip=True),), **PLAIN)
    assert set(compile(model, [X], recipe, example_inputs=[X[:2]]).quantizers) == {"b/input"}
