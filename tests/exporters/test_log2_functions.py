"""The model-local functions, alone, under ONNX Runtime: the same values as the FX operators, and exact zeros."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import repquant_fx.ops  # noqa: F401 - registers the operators
from repquant_fx.exporters import functions
from repquant_fx.quantizers.logarithmic import level_table
from repquant_fx.runtime import run, session

BITS = range(2, 9)
LOWEST = torch.finfo(torch.float32).min


def execute(function: onnx.FunctionProto, x: Tensor, scale: float, **attributes: int) -> Tensor:
    node = helper.make_node(function.name, [function.input[0], "scale"], ["y"], domain=functions.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(function.input[0], TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])])
    model = helper.make_model(graph, functions=[function], ir_version=10, opset_imports=[
        helper.make_opsetid("", functions.OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)])
    onnx.checker.check_model(model, full_check=True)
    return run(session(model), {function.input[0]: x})[0]


def same(found: Tensor, expected: Tensor, scale: float, bits: int, steps: int) -> None:
    """Equal up to float rounding, but for codes on a tie, which may differ by one level."""
    close = torch.isclose(found, expected, rtol=1e-5, atol=0)
    assert float(close.double().mean()) > 0.995
    levels = level_table(scale, bits, steps).flip(0)  # ascending
    nearest = [torch.searchsorted(levels.contiguous(), v[~close] * (1 - 1e-3)) for v in (found, expected)]
    assert bool(((nearest[0] - nearest[1]).abs() <= 1).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("scale", [0.9, 0.21])  # the second saturates the largest values
def test_log2_softmax_equals_the_fx_operator(bits: int, steps: int, scale: float) -> None:
    logits = 4 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(bits))
    logits[:, :, 7:9] = LOWEST
    found = execute(functions.log2_softmax(), logits, scale, axis=-1, bits=bits, steps=steps)
    expected = torch.ops.repquant_fx.log2_softmax(logits, torch.tensor(scale), 2, bits, steps)
    same(found, expected, scale, bits, steps)
    assert bool((found[:, :, 7:9] == 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_log2_quantize_gives_every_level(bits: int) -> None:
    table = level_table(0.8, bits, 2)
    values = torch.cat([table, torch.zeros(3)])[None]
    found = execute(functions.log2_quantize(), values, 0.8, bits=bits, steps=2)
    normal = values > 1e-37
    torch.testing.assert_close(found[normal], values[normal], rtol=1e-5, atol=0)
    assert bool((found[:, -4:] == 0).all())  # the zero code and the zeros


def test_minus_infinity_is_zero_and_a_row_hidden_whole_stays_finite() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [LOWEST, LOWEST, LOWEST]])
    found = execute(functions.log2_softmax(), logits, 0.5, axis=1, bits=4, steps=2)
    assert float(found[0, 1]) == 0 and bool(torch.isfinite(found).all()) and bool((found[1] > 0).all())


def test_the_axis_is_an_attribute() -> None:
    logits = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    turned = execute(functions.log2_softmax(), logits.transpose(1, 2).contiguous(), 0.6, axis=1, bits=5, steps=2)
    straight = execute(functions.log2_softmax(), logits, 0.6, axis=2, bits=5, steps=2)
    torch.testing.assert_close(turned.transpose(1, 2), straight, rtol=1e-5, atol=0)
