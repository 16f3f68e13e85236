"""Models that the fuzzer found, each of which once ended in something other than a file or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.compiler import CompiledModel
from repquant_fx.errors import InputError


class Around(nn.Module):
    """A Linear and any use of it; `extra` is a layer for `use` to call."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Any], extra: nn.Module | None = None) -> None:
        super().__init__()
        self.use, self.fc, self.extra = use, nn.Linear(4, 4), extra
        self.table = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def compiled(model: nn.Module, recipe: Recipe | None = None, shape: tuple[int, ...] = (4,)) -> CompiledModel:
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    return compile(model, [x], recipe or Recipe(), example_inputs=[x[:2]])


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (x, m.fc(x)),
        lambda m, x: (m.fc(x), x, x),
        lambda m, x: (m.fc(x), m.table),
        lambda m, x: (lambda y: (y, y))(m.fc(x)),
        lambda m, x: (lambda y: (y, y[:, 0], y.T))(m.fc(x)),
    ],
    ids=["input", "input twice", "parameter", "twice", "views"],
)
def test_outputs_that_are_no_results_of_their_own(use: Callable[[nn.Module, Tensor], Any]) -> None:
    result = compiled(Around(use))
    x = torch.randn(3, 4)
    found = result.session().run(None, {"x": x.numpy()})
    expected = result.graph_module(x)
    assert len(found) == len(expected) and len({o.name for o in result.proto.graph.output}) == len(found)
    assert all(torch.allclose(torch.from_numpy(f), e, atol=1e-5) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.addmm(m.fc(x), x, m.extra.weight),
        lambda m, x: torch.addmm(m.extra.bias, m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.extra.weight[:1], m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.extra.weight[0, 0], m.fc(x), m.extra.weight),
        lambda m, x: torch.addmm(m.fc(x), x, m.extra.weight, beta=2),
    ],
    ids=["residual", "bias", "row", "scalar", "factor"],
)
def test_what_an_addmm_adds(use: Callable[[nn.Module, Tensor], Any]) -> None:
    """A bias where it has one value per output channel, else what is added to the product."""
    result = compiled(Around(use, nn.Linear(4, 4)))
    assert [entry["operator"] for entry in result.report["layers"]].count("linear") in (1, 2)


def test_a_layer_of_no_channels() -> None:
    assert compiled(
        Around(lambda m, x: torch.cat([m.fc(x), m.extra(x)], -1), nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)))
    ).parity


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (m.fc(x), m.extra(x).double() @ m.extra.weight.double()),
        lambda m, x: (m.fc(x), x.long() @ x.long().T),
        lambda m, x: m.fc(x).double().sum(-1),
    ],
    ids=["float64", "integers", "float64 output"],
)
def test_what_is_not_float32_is_left_alone(use: Callable[[nn.Module, Tensor], Any]) -> None:
    report = compiled(Around(use, nn.Linear(4, 4))).report
    assert all(entry["operator"] == "linear" for entry in report["layers"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_precision_is_compiled_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(8, 4).to(dtype)
    assert compile(model, [x], example_inputs=[x[:2]]).parity is not None and model[0].weight.dtype == dtype


def test_a_keyword_as_a_name_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("class", nn.Linear(4, 4))
    with pytest.raises(InputError, match="Python keyword 'class'"):
        compiled(model)


def test_infinite_outputs_agree() -> None:
    assert compiled(Around(lambda m, x: m.fc(x).masked_fill(x > 0, float("-inf")))).parity


def test_an_rms_norm_of_a_number() -> None:
    """Written out, of a value without axes: no norm, but no failure."""
    assert compiled(
        Around(lambda m, x: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))(m.fc(x).mean()))
    ).parity


def test_a_layer_that_only_a_check_reads() -> None:
    """`nonzero` brings checks of its size, which keep alive what no output needs."""
    report = compiled(Around(lambda m, x: (m.fc(x), m.extra(m.fc(x)).nonzero())[0], nn.Linear(4, 3))).report
    assert [entry["path"] for entry in report["layers"]] == ["fc"]


def test_a_result_of_unknown_size_still_has_its_check() -> None:
    result = compiled(Around(lambda m, x: (m.fc(x), (x > 0).nonzero())))
    assert [o.name for o in result.proto.graph.output] == ["output_0", "output_1"]


@pytest.mark.parametrize(
    "layer, shape",
    [(nn.Conv2d(3, 4, 2), (3, 8, 8)), (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)), (nn.Conv1d(3, 4, 2), (3, 8))],
)
def test_a_convolution_without_a_batch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    result = compile(layer, [(x,)], example_inputs=[x])
    assert result.parity is not None and len(result.report["layers"]) == 1
