"""Operators that several passes know, by what they do."""

from __future__ import annotations

import torch

from repquant_fx import ops  # noqa: F401 - registers the operators

aten = torch.ops.aten

NORMS = {aten.layer_norm.default, aten.rms_norm.default}
CONVOLUTIONS = {aten.conv2d.default, aten.conv1d.default}

QUANTIZE = torch.ops.repquant_fx.quantize.default
DEQUANTIZE = torch.ops.repquant_fx.dequantize.default
LOG2_SOFTMAX = torch.ops.repquant_fx.log2_softmax.default
LOG2_QUANTIZE = torch.ops.repquant_fx.log2_quantize.default
