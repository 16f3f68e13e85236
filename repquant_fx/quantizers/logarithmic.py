"""Logarithmic quantization of Softmax activations (RepQuant Eq. 15-17), as pure functions on tensors.

`steps` is the number of codes per octave: 2 is the paper's log-sqrt2 quantizer, 1 is log2; with many bits more steps
pay, since 2 leave an error of up to 19 % however many bits there are. The top code `2^b - 1` is reserved for exact
zero: an attention mask makes exact zeros, and the plain formula would turn each into the smallest level, a leak that
grows with the number of masked tokens. So b bits hold `2^b - 1` levels and a zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ON_GRID = 1e-5  # of a step: a float32 scale that was meant to be a power
SMALLEST_SUM = 2.0**-126  # of a row that is divided by it: one whose codes are all that of zero stays zero


def zero_code(bits: int) -> int:
    """The code that dequantizes to exact zero: zeros, and values more than half a step below the smallest level."""
    return (1 << bits) - 1


def quantize_log(log_a: Tensor, scale: float, bits: int, steps: int = 2) -> Tensor:
    """Codes `clip(round(-steps * log2(A / scale)), 0, 2^bits - 1)` (Eq. 15) from the *natural logarithm* of A.

    Taking the logarithm as input lets LogSoftmax feed the quantizer directly: log2 quantization is uniform quantization
    of the logarithm. A scale that is a whole number of steps below 1 (see `snap`) is then a zero point, and the
    arithmetic below (divide, round half to even, add, saturate) is that of ONNX QuantizeLinear with scale `ln 2 /
    steps`, in float32, so that codes agree. `log_a = -inf` gives the zero code.
    """
    width = torch.tensor(math.log(2) / steps, dtype=log_a.dtype, device=log_a.device)
    offset = steps * math.log2(scale)
    whole = round(offset)
    fraction = offset - whole if abs(offset - whole) > ON_GRID else 0.0
    return (whole - torch.round(log_a / width - fraction)).clamp(0, zero_code(bits))


def exponents(bits: int) -> range:
    """The `m` of all scales `2^(m / steps)` that leave a zero point `2^bits - 1 - m` in uint8, up to a scale of 1."""
    return range(zero_code(bits) - 255, 1)


def snap(scale: float, bits: int, steps: int = 2) -> float:
    """The nearest scale `2^(m / steps)` that is a zero point of the logarithm."""
    allowed = exponents(bits)
    return float(2.0 ** (min(max(round(steps * math.log2(scale)), allowed[0]), allowed[-1]) / steps))


def quantize(a: Tensor, scale: float, bits: int, steps: int = 2) -> Tensor:
    """Codes of the non-negative values `a` (Eq. 15), in the dtype of `a`."""
    return quantize_log(torch.log(a), scale, bits, steps)


def dequantize(codes: Tensor, scale: float, bits: int, steps: int = 2) -> Tensor:
    """`scale * 2^(-codes / steps)`, and 0 for the zero code: the quantizer used while calibrating."""
    values = scale * torch.exp2(-codes / steps)
    return torch.where(codes == zero_code(bits), torch.zeros_like(values), values)


def dequantize_shift(codes: Tensor, scale: float, bits: int, steps: int = 2) -> Tensor:
    """The same values by a shift of the reparameterized scale (Eq. 16-17 for `steps = 2`).

    `s' * 2^floor(-q/steps)` with `s' = s * 2^(r/steps)`, `r = -q mod steps`: the low bits of the code choose one of
    `steps` scales (for two, `s` and `s * sqrt2`) and the rest of the code is a shift.
    """
    scales = torch.tensor([scale * 2 ** (r / steps) for r in range(steps)], dtype=codes.dtype, device=codes.device)
    values = torch.ldexp(scales[torch.remainder(-codes, steps).long()], torch.floor(-codes / steps))
    return torch.where(codes == zero_code(bits), torch.zeros_like(values), values)


def level_table(scale: float, bits: int, steps: int = 2) -> Tensor:
    """The `2^bits` dequantized values by code, float32: what the exported operator computes."""
    return dequantize(torch.arange(1 << bits, dtype=torch.float64), scale, bits, steps).float()


def fake_quantize(a: Tensor, scale: float, bits: int, steps: int = 2) -> Tensor:
    """Quantize, then dequantize."""
    return dequantize(quantize(a, scale, bits, steps), scale, bits, steps)


def normalized(values: Tensor) -> Tensor:
    """Each row (the last axis) divided by its sum; rows of zeros stay zero."""
    return values / values.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)


def scale_candidates(largest: float, bits: int, steps: int = 2) -> list[float]:
    """Scales worth trying for values up to `largest`, from there down, in steps of the code, or coarser where these are
    many.

    A smaller scale saturates the few large values and moves the levels towards the many small ones; the range searched
    lets the smallest level fall to about 2^-16 of the largest value.
    """
    span = min(16.0, max(2.0, 12.0 - ((1 << bits) - 2) / steps))
    allowed = exponents(bits)
    first = min(max(math.ceil(steps * math.log2(largest)), allowed[0]), allowed[-1])
    count = min(int(span * steps), first - allowed[0])
    return [2.0 ** ((first - i) / steps) for i in range(0, count + 1, max(1, -(-count // 48)))]
