"""Affines and rotations moved between constants, integer biases: what the layers compute stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repquant_fx.quantizers.affine import into_reader, into_writer, scale_input, scale_output
from repquant_fx.quantizers.bias import LIMIT, round_bias
from repquant_fx.quantizers.requantization import Operand, requantize
from repquant_fx.quantizers.rotation import rotate_columns, rotate_rows, rotate_vectors, rotated_bias, rotation


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), biases=st.booleans(), norm=st.booleans())
def test_what_a_writer_takes_in_its_reader_undoes(seed: int, biases: bool, norm: bool) -> None:
    x, w, gain, b, v, c, factor, shift = draw(seed, (9, 5), (6, 5), (6,), (6,), (4, 6), (4,), (6,), (6,))
    factor, weight, first, second = factor.exp(), gain if norm else w, b if biases else None, c if biases else None
    x = x @ w.T if norm else x  # a norm multiplies each channel of its input

    def write(weight: Tensor, bias: Tensor | None) -> Tensor:
        return (x * weight if norm else x @ weight.T) + (0 if bias is None else bias)

    y = write(weight, first)
    moved = write(*into_writer(weight, first, factor, shift))
    torch.testing.assert_close(moved, (y - shift) / factor, rtol=1e-10, atol=1e-10)
    reader, bias = into_reader(v, second, factor, shift)
    torch.testing.assert_close(moved @ reader.T + bias, y @ v.T + (c if biases else 0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((y / factor) @ scale_input(v, factor).T, y @ v.T, rtol=1e-10, atol=1e-10)
    scaled, bias = scale_output(v, second, c)
    torch.testing.assert_close(y @ scaled.T + (0 if bias is None else bias), (y @ v.T + (c if biases else 0)) * c)


@pytest.mark.parametrize("block", [0, 1])
def test_a_rotation_is_undone_by_what_reads_it(block: int) -> None:
    x, w, b, v, gain = draw(1, (7, 3), (8, 3), (8,), (5, 8), (8,))
    r = rotation(4, 3, ones=False)
    whole = torch.block_diag(*(r if i == block else torch.eye(4, dtype=r.dtype) for i in range(2)))
    y = x @ rotate_rows(w, r, block).T + rotate_rows(b, r, block)
    torch.testing.assert_close(y, (x @ w.T + b) @ whole)
    torch.testing.assert_close(y @ rotate_columns(v, r, block).T, (x @ w.T + b) @ v.T)
    torch.testing.assert_close(rotate_vectors(v, r), torch.cat([v[:, :4] @ r, v[:, 4:] @ r], 1))
    torch.testing.assert_close(rotated_bias(b * gain, gain, r), rotate_vectors(b, r))


def test_a_bias_is_rounded_to_steps_of_its_product_or_does_not_fit() -> None:
    bias, scales = torch.tensor([1.0, -2.5, 0.0]), torch.tensor([0.5, 0.25, 1.0])
    found = round_bias(bias, torch.tensor(0.01), scales)
    assert found is not None and found.codes.dtype == torch.int32
    assert bool(((found.codes * found.scale - bias).abs() <= found.scale / 2).all())
    assert round_bias(torch.tensor([1.01 * LIMIT, 0, 0]), torch.tensor(1.0), torch.ones(3)) is None


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_that_writes_codes_computes_what_it_did(biased: bool) -> None:
    input_scale, scales = torch.tensor(0.02), torch.tensor([0.1, 0.2, 0.3, 0.4])
    sums = torch.arange(-40, 40).reshape(20, 4)  # products of integer codes
    bias = torch.tensor([5, -3, 70, 0], dtype=torch.int32) if biased else None
    total = sums + (bias if bias is not None else 0)
    operands = [Operand(torch.tensor([2, 0]), torch.tensor(0.7).double(), torch.tensor(8.0).double()),
                Operand(torch.tensor([1]), torch.tensor(0.3).double(), torch.tensor(3.0).double())]
    found = requantize(input_scale, scales, bias, operands)
    assert found is not None and found.bias.codes[[0, 2]].tolist() == ([5, 70] if biased else [0, 0])
    output = (sums + found.bias.codes) * (input_scale * found.weight_scale).double()
    expected = total * (input_scale * scales).double()
    torch.testing.assert_close((output - found.output.offset) * found.output.step, expected, rtol=1e-6, atol=1e-6)
    assert found.output.step.tolist() == pytest.approx([0.7, 0.3, 0.7, 1.0])
    assert float((found.output.offset - torch.tensor([0.0, -5, 0, 0])).abs().max()) == pytest.approx(found.apart)
    assert requantize(input_scale, torch.full((4,), 1e-45), bias, operands) is None
