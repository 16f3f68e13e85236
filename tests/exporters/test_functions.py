"""The model-local functions, each alone in a model under ONNX Runtime: the same codes and values as the FX operators.
"""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from repquant_fx import ops
from repquant_fx.exporters import functions
from repquant_fx.quantizers.logarithmic import level_table, snap, zero_code
from repquant_fx.runtime import run, session

BITS = range(2, 9)
STEPS = (1, 2)
LOWEST = torch.finfo(torch.float32).min


def alone(function: onnx.FunctionProto, rank: int, **attributes: int | float) -> onnx.ModelProto:
    """A model that is one call of `function`; any sizes."""
    node = helper.make_node(function.name, ["x", "scale"], ["y"], domain=functions.DOMAIN, **attributes)
    x, scale, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                   for name, shape in (("x", [None] * rank), ("scale", []), ("y", [None] * rank)))
    model = helper.make_model(
        helper.make_graph([node], "main", [x, scale], [y]),
        functions=[function],
        ir_version=10,
        opset_imports=[
            helper.make_opsetid("", functions.OPSET),
            helper.make_opsetid(functions.DOMAIN, functions.VERSION),
        ],
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def softmax_of(logits: Tensor, scale: float, *, axis: int, bits: int, steps: int) -> Tensor:
    threshold = functions.threshold(scale, bits, steps)
    runner = session(
        alone(functions.log2_softmax(), logits.ndim, axis=axis, bits=bits, steps=steps, threshold=threshold), threads=1
    )
    return run(runner, {"x": logits, "scale": torch.tensor(scale)})[0]


def quantized_of(values: Tensor, scale: float, *, bits: int, steps: int) -> Tensor:
    threshold = functions.threshold(scale, bits, steps)
    runner = session(
        alone(functions.log2_quantize(), values.ndim, bits=bits, steps=steps, threshold=threshold), threads=1
    )
    return run(runner, {"x": values, "scale": torch.tensor(scale)})[0]


def codes(values: Tensor, scale: float, bits: int, steps: int) -> Tensor:
    """The code of each value; fails where a value is none of the levels."""
    levels = level_table(scale, bits, steps).double()
    index = (values.double()[..., None] - levels).abs().argmin(-1)
    # float32 Exp of -88 is off by 88 times its own precision; neighbours are 9 % apart at least
    torch.testing.assert_close(values.double(), levels[index], rtol=1e-5, atol=1e-42)
    return index


def check(found: Tensor, expected: Tensor, log_a: Tensor, scale: float, bits: int, steps: int) -> None:
    """Equal code for code; only where the logarithm lies on a rounding boundary may a code be the neighbour."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    f, e = codes(found, scale, bits, steps), codes(expected, scale, bits, steps)
    position = -steps * (log_a.double() / math.log(2) - math.log2(scale))
    boundary = ((position - position.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(f[~boundary], e[~boundary])
    assert int((f - e).abs().max()) <= 1
    assert boundary.double().mean() < 0.01


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", BITS)
def test_log2_softmax_equals_the_operator(bits: int, steps: int) -> None:
    logits = 4 * torch.randn(3, 2, 17, 33, generator=torch.Generator().manual_seed(bits))
    scale = snap(0.83, bits, steps)
    expected = ops.log2_softmax(logits, torch.tensor(scale), 3, bits, steps)
    check(
        softmax_of(logits, scale, axis=3, bits=bits, steps=steps),
        expected,
        torch.log_softmax(logits, 3),
        scale,
        bits,
        steps,
    )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", BITS)
def test_log2_quantize_equals_the_operator(bits: int, steps: int) -> None:
    values = torch.softmax(5 * torch.randn(4, 9, 31, generator=torch.Generator().manual_seed(bits)), -1)
    values[:, :, 7] = 0
    scale = snap(0.61, bits, steps)
    expected = ops.log2_quantize(values, torch.tensor(scale), bits, steps)
    found = quantized_of(values, scale, bits=bits, steps=steps)
    kept = values > 0
    check(found[kept], expected[kept], values[kept].log(), scale, bits, steps)
    assert bool((found[:, :, 7] == 0).all()) and bool((expected[:, :, 7] == 0).all())


@pytest.mark.parametrize("steps", [4, 8])
def test_finer_grids(steps: int) -> None:
    logits = 4 * torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(steps))
    scale = snap(0.7, 6, steps)
    expected = ops.log2_softmax(logits, torch.tensor(scale), 2, 6, steps)
    check(
        softmax_of(logits, scale, axis=2, bits=6, steps=steps), expected, torch.log_softmax(logits, 2), scale, 6, steps
    )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_reached_and_reproduced(bits: int, steps: int) -> None:
    """What is on the grid stays where it is: each of the 2^b - 1 levels, and zero."""
    scale = snap(0.37, bits, steps)
    levels = level_table(scale, bits, steps)
    found = quantized_of(levels, scale, bits=bits, steps=steps)
    # the grid of 8 bits and one step reaches beyond float32: those levels are zero already
    assert torch.equal(codes(found, scale, bits, steps)[levels > 1e-37], torch.arange(len(levels))[levels > 1e-37])
    assert float(found[zero_code(bits)]) == 0.0
    assert bool((found[levels == 0] == 0).all())


@pytest.mark.parametrize("mask", [-math.inf, LOWEST, -1e9], ids=["-inf", "finfo.min", "-1e9"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", BITS)
def test_masked_positions_are_exactly_zero(bits: int, steps: int, mask: float) -> None:
    """One masked token that leaks 2^-7.5 of the scale is small; a thousand of them are not."""
    logits = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    logits[0, :, 5:] = mask
    logits[1] += torch.full((4, 64), mask).triu(1)
    scale = snap(0.7, bits, steps)
    found = softmax_of(logits, scale, axis=-1, bits=bits, steps=steps)
    expected = ops.log2_softmax(logits, torch.tensor(scale), 2, bits, steps)
    assert bool(torch.isfinite(found).all())
    for result in (found, expected):
        assert torch.count_nonzero(result[0, :, 5:]) == 0 and torch.count_nonzero(result[1].triu(1)) == 0
        assert float(result[1, 0, 0]) == pytest.approx(scale, rel=1e-6)  # the one token that is left
    assert not bool(torch.signbit(found).any()), "a negative zero"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", BITS)
def test_values_above_the_scale_saturate_at_it(bits: int, steps: int) -> None:
    scale = snap(0.1, bits, steps)
    values = scale * torch.tensor([10.0, 5, 1.1, 1, 1e7])
    found = quantized_of(values, scale, bits=bits, steps=steps)
    torch.testing.assert_close(found, torch.full((5,), scale), rtol=1e-6, atol=0)
    logits, scale = torch.tensor([[9.0, 0.0, 0.0, 0.0]]), snap(0.02, bits, steps)
    torch.testing.assert_close(
        softmax_of(logits, scale, axis=1, bits=bits, steps=steps)[0, 0], torch.tensor(scale), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_axis(axis: int) -> None:
    logits = 3 * torch.randn(7, 11, 13, generator=torch.Generator().manual_seed(3))
    scale = 2**-0.5
    expected = ops.log2_softmax(logits, torch.tensor(scale), axis % 3, 4, 2)
    check(softmax_of(logits, scale, axis=axis, bits=4, steps=2), expected, torch.log_softmax(logits, axis), scale, 4, 2)
    other = ops.log2_softmax(logits, torch.tensor(scale), (axis + 1) % 3, 4, 2)
    assert not torch.allclose(expected, other), "the axes cannot be told apart by this test"


def test_ties_round_half_to_even() -> None:
    """log2 with scale 1: A = 2^-0.5 lies on the boundary of the codes 0 and 1, 2^-1.5 on that of 1 and 2."""
    values = torch.tensor([2.0**-1, 2.0**-2, 2.0**-3])
    exact = quantized_of(values, 1.0, bits=4, steps=1)
    torch.testing.assert_close(exact, values, rtol=1e-6, atol=0)
    just_above, just_below = torch.tensor([2.0**-0.499]), torch.tensor([2.0**-0.501])
    assert float(quantized_of(just_above, 1.0, bits=4, steps=1)) == pytest.approx(1.0, rel=1e-6)
    assert float(quantized_of(just_below, 1.0, bits=4, steps=1)) == pytest.approx(0.5, rel=1e-6)


def test_the_functions_are_standard_operators_only() -> None:
    for function, attributes in ((functions.log2_softmax(), ["axis", "bits", "steps", "threshold"]),
                                 (functions.log2_quantize(), ["bits", "steps", "threshold"])):
        assert {node.domain for node in function.node} <= {"", "ai.onnx"}
        assert list(function.input)[1] == "scale" and list(function.output) == ["output"]
        assert list(function.attribute) == attributes and function.doc_string
        assert [(o.domain, o.version) for o in function.opset_import] == [("", 21)]
