"""Operators that several passes know, by what they do."""

from __future__ import annotations

import operator

import torch

from repquant_fx import ops  # noqa: F401 - registers the operators

aten = torch.ops.aten

NORMS = {aten.layer_norm.default, aten.rms_norm.default}
CONVOLUTIONS = {aten.conv2d.default, aten.conv1d.default}

IDENTITIES = {
    aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default, aten.contiguous.default,
    aten.dropout.default, aten.lift_fresh_copy.default, aten.feature_dropout.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
LAYOUT = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints,
    aten.unflatten.int,
}
MOVES = LAYOUT | {aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, aten.chunk.default,
                  operator.getitem}  # what may move integer codes about

QUANTIZE = torch.ops.repquant_fx.quantize.default
DEQUANTIZE = torch.ops.repquant_fx.dequantize.default
LOG2_SOFTMAX = torch.ops.repquant_fx.log2_softmax.default
LOG2_QUANTIZE = torch.ops.repquant_fx.log2_quantize.default
# the argument that gives its size, type or device, but no values
SIZED = {
    aten.sym_size.int: 0, aten.sym_numel.default: 0, aten.copy.default: 0, aten.fill.Scalar: 0, aten.zero.default: 0,
    aten.zeros_like.default: 0, aten.ones_like.default: 0, aten.empty_like.default: 0, aten.full_like.default: 0,
    aten.rand_like.default: 0, aten.randn_like.default: 0, aten.new_zeros.default: 0, aten.new_ones.default: 0,
    aten.new_empty.default: 0, aten.new_full.default: 0,
    aten.expand_as.default: 1, aten.view_as.default: 1, aten.type_as.default: 1,
}
