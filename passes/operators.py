"""Operators that several passes know, by what they do. No other file holds such a table."""

from __future__ import annotations

import operator

import torch

from repquant_fx import ops  # noqa: F401 - registers the operators

aten = torch.ops.aten

# ---- layers ----------------------------------------------------------------------------------------------------------

NORMS = {aten.layer_norm.default, aten.rms_norm.default}
OTHER_NORMS = {aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default,
               aten._native_batch_norm_legit_no_training.default}  # what export makes of BatchNorm
CONVOLUTIONS = {aten.conv2d.default, aten.conv1d.default}
MATMULS = {aten.matmul.default, aten.bmm.default}
PRODUCTS = CONVOLUTIONS | MATMULS | {aten.linear.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
# where an operator takes its weight, and its bias where it can have one
PARAMETERS: dict[object, tuple[int, ...]] = {
    aten.linear.default: (1, 2), aten.conv1d.default: (1, 2), aten.conv2d.default: (1, 2),
    aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,), aten.embedding.default: (0,),
    torch.ops.repquant_fx.affine.default: (1, 2),
}

# ---- what has another spelling in a canonical graph ------------------------------------------------------------------

IDENTITIES = {
    aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default, aten.contiguous.default,
    aten.dropout.default, aten.lift_fresh_copy.default, aten.feature_dropout.default,
}
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}
BOUNDS = {operator.ge, operator.gt, operator.le, operator.lt}
VIEWS = {aten.view.default, aten._unsafe_view.default}

# ---- what only moves elements ----------------------------------------------------------------------------------------

TRANSPOSES = {aten.permute.default, aten.transpose.int, aten.t.default}
LAYOUT = TRANSPOSES | {  # one tensor into one tensor
    aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.slice.Tensor, aten.select.int, aten.flatten.using_ints, aten.unflatten.int,
}
CODE_MOVES = LAYOUT | {  # what integer codes may pass through
    aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, aten.chunk.default, operator.getitem,
}
MOVES = CODE_MOVES | {
    aten.squeeze.default, aten.roll.default, aten.flip.default, aten.cat.default, aten.stack.default,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.movedim.int, aten.pixel_unshuffle.default,
    aten.pixel_shuffle.default,
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
INDEXING = {aten.index.Tensor, aten.index_select.default}

# ---- arithmetic ------------------------------------------------------------------------------------------------------

CASTS = {aten._to_copy.default, aten.to.dtype, aten.clone.default}
HOMOGENEOUS = {aten.relu.default, aten.neg.default, aten.leaky_relu.default}  # f(c x) = c f(x) for c > 0
MASKS = {aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor}
# what keeps the rows of attention logits apart
ROW_WISE = MASKS | {aten.add.Tensor, aten.reshape.default, aten.unsqueeze.default, aten.expand.default}
ELEMENT_WISE = {
    aten.gelu.default, aten.relu.default, aten.relu_.default, aten.silu.default, aten.sigmoid.default,
    aten.tanh.default, aten.neg.default, aten.hardswish.default, aten.leaky_relu.default, aten.exp.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.div.Tensor,
}
# functions of one tensor that no factor commutes with
NONLINEAR = {
    aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.mish.default, aten.elu.default,
    aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.exp.default, aten.softplus.default,
    aten.hardsigmoid.default, aten.pow.Tensor_Scalar,
}
# what activation functions are written with beside them
ARITHMETIC = {
    aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.div.Tensor,
    aten.neg.default, aten.relu.default, aten.hardtanh.default, aten.clamp.default,
}
SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
ROUNDINGS = {aten.round.default, aten.round.decimals, aten.floor.default, aten.ceil.default, aten.trunc.default}
# whether it takes a shift along, too: sum(x + s) is not sum(x) + s
REDUCTIONS = {aten.mean.dim: True, aten.amax.default: True, aten.sum.dim_IntList: False}
# over these axes, where they pool to one value
GLOBAL_POOLS = {aten.adaptive_avg_pool1d.default: [-1], aten.adaptive_avg_pool2d.default: [-2, -1]}
POOLS = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.max_pool2d.default}

# ---- ours ------------------------------------------------------------------------------------------------------------

AFFINE = torch.ops.repquant_fx.affine.default
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
