"""What has no ONNX form is found before it is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Encoder, Function, canonical, count, redraw, sequences
from torch import Tensor, nn

from repquant_fx import compile
from repquant_fx.errors import InputError
from repquant_fx.exporters import trial
from repquant_fx.exporters.dynamic_shapes import dynamic_shapes
from repquant_fx.exporters.onnx_qdq import UnwritableError
from repquant_fx.exporters.trial import try_translation, untranslated


class Inner(nn.Module):
    """An operator that ONNX has not, behind a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.fc(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.strange = nn.Linear(8, 8), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.strange(self.first(x))


def tried(graph_module: torch.fx.GraphModule) -> None:
    try_translation(graph_module, [sequences(2)], input_names=["x"], output_names=["y"],
                    dynamic_shapes=dynamic_shapes(graph_module))


def test_before_any_data_is_read() -> None:
    """With the node and its module; nothing is observed, clipped or rounded for it."""
    def data() -> Any:
        raise AssertionError("calibration data was asked for")

    with pytest.raises(InputError, match=r"cannot be written as ONNX.*bessel_j0.*the node special_bessel_j0 "
                                         r"\(aten.special_bessel_j0.default\) of the module strange"):
        compile(Outer(), data, example_inputs=[sequences(2)])


def test_all_that_a_transformer_needs_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small one is not translated twice."""
    graph_module = canonical(redraw(Encoder(causal=True)), sequences())
    assert untranslated(graph_module) == []
    monkeypatch.setattr(trial, "translate", lambda *_: pytest.fail("it was translated"))
    tried(graph_module)


def test_a_large_one_is_translated_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = canonical(redraw(Encoder()), sequences())
    before, parameters = str(graph_module.graph), dict(graph_module.named_parameters())
    calls = []
    translate = trial.translate
    monkeypatch.setattr(trial, "translate", lambda *arguments: calls.append(translate(*arguments)))
    monkeypatch.setattr(trial, "TRIED_FROM", sum(tensor.numel() for tensor in graph_module.parameters()))
    tried(graph_module)
    assert len(calls) == 1 and str(graph_module.graph) == before
    after = dict(graph_module.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)
    shared = {tensor.const_value.numpy().ctypes.data for tensor in calls[0].graph.initializers.values()}
    assert shared >= {parameter.data_ptr() for parameter in parameters.values() if parameter.ndim > 1}


def test_what_is_decomposed_goes_through() -> None:
    graph_module = canonical(Function(lambda x: torch.nn.functional.huber_loss(x @ torch.ones(8, 8), x)), sequences())
    assert untranslated(graph_module) and count(graph_module, torch.ops.aten.huber_loss.default)
    tried(graph_module)


def test_an_output_that_is_an_input() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.special.bessel_j0(x)

    with pytest.raises(UnwritableError, match="bessel_j0"):
        tried(canonical(Both(), sequences()))
