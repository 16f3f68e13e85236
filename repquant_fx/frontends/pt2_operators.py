"""Which operators a program from a file may call: those that inference needs, whose kernels check their arguments.

A kernel trusts the graph that calls it. Most check shapes and indices themselves; a backward kernel, a `_` kernel
behind a checked front or one that leaves memory uninitialized does not. So the operators are listed, and all others are
refused by name.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from repquant_fx.torch_private import OpOverload, has_kernel, schema

aten = torch.ops.aten

_ELEMENTWISE = """abs acos acosh add addcdiv addcmul arctan arctan2 asin asinh atan atan2 atanh bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min
    clip copysign cos cosh deg2rad div divide elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor
    floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh
    hypot isfinite isinf isnan isneginf isposinf le leaky_relu lerp less less_equal log log10 log1p log2 log_sigmoid
    logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish
    mul multiply nan_to_num ne neg negative not_equal positive pow prelu _prelu_kernel rad2deg reciprocal relu relu6
    remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt square sub subtract
    tan tanh tanhshrink threshold true_divide trunc where xlogy __and__ __or__ __xor__ __lshift__ __rshift__"""
_REDUCTIONS = """all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum
    linalg_norm linalg_vector_norm log_softmax _log_softmax logcumsumexp logsumexp max mean median min msort norm
    prod softmax _softmax sort std std_mean sum topk var var_mean"""
_PRODUCTS = """addbmm addmm addmv baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot einsum inner kron linalg_cross
    linalg_multi_dot linear matmul mm mv outer scaled_dot_product_attention tensordot vdot"""
_LAYERS = """_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm
    channel_shuffle constant_pad_nd cosine_embedding_loss dropout embedding feature_dropout glu grid_sampler
    grid_sampler_2d group_norm im2col col2im instance_norm layer_norm lift_fresh lift_fresh_copy max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d native_channel_shuffle native_dropout native_group_norm
    native_layer_norm normalize one_hot pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d rms_norm unfold _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d"""
_SHAPES = """alias as_strided atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to
    cartesian_prod cat chunk clone column_stack combinations concat concatenate contiguous detach diag diag_embed
    diagonal dsplit dstack expand expand_as flatten flip fliplr flipud hsplit hstack meshgrid moveaxis movedim mT
    narrow numpy_T permute ravel repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll rot90
    row_stack select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile transpose tril
    tril_indices triu triu_indices unbind unflatten unsqueeze view view_as vsplit vstack"""
_INDEXING = """bucketize diagonal_scatter gather index index_add index_copy index_fill index_put index_select
    masked_scatter masked_select nonzero nonzero_numpy scatter scatter_add searchsorted select_scatter slice_scatter
    take take_along_dim"""
_MAKING = """arange eye fill full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor zeros
    zeros_like"""
_CONVERTING = """bool copy double float half int item _local_scalar_dense long to _to_copy type_as"""
_CHECKING = """_assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size
    sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride"""
# whose unchecked or uninitialized kernel is replaced, see `use_checked`
_REPLACED = """_native_batch_norm_legit _native_batch_norm_legit_no_training _unsafe_index _unsafe_view empty
    empty_like new_empty"""

_FUNCTIONAL = frozenset(
    " ".join(
        (_ELEMENTWISE, _REDUCTIONS, _PRODUCTS, _LAYERS, _SHAPES, _INDEXING, _MAKING, _CONVERTING, _CHECKING, _REPLACED)
    ).split()
)
_IN_PLACE = frozenset(
    f"{name}_"
    for name in (*_ELEMENTWISE.split(), "copy", "cumsum", "detach", "dropout", "fill", "zero", "tril", "triu")
)
_DRAWS_IN_TRAINING = {
    "scaled_dot_product_attention",
    "dropout",
    "dropout_",
    "native_dropout",
    "alpha_dropout",
    "feature_dropout",
}
_ARGUMENTS = frozenset(
    "Tensor Scalar int float bool str SymInt SymFloat SymBool ScalarType Layout Device MemoryFormat number".split()
)

_SYMBOLIC = {
    f"_operator.{name}": getattr(operator, name)
    for name in "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem".split()
}
_SYMBOLIC_NAMES = (
    frozenset(_SYMBOLIC)
    | {f"torch.sym_{name}" for name in "not int float ite max min sqrt".split()}
    | {"math.trunc", "math.ceil", "math.floor"}
)
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}" for name in ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")
)


def is_safe_target(target: str) -> bool:
    """Whether a target, as `.pt2` files spell it, is arithmetic of sizes or an operator that inference needs."""
    if target in _SYMBOLIC_NAMES or target in _HIGHER_ORDER:
        return True
    parts = target.split(".")
    if len(parts) != 5 or parts[:3] != ["torch", "ops", "aten"] or parts[3] not in _FUNCTIONAL | _IN_PLACE:
        return False
    found = getattr(getattr(aten, parts[3], None), parts[4], None)
    return isinstance(found, OpOverload) and is_safe_operator(found)


def is_safe_operator(found: OpOverload) -> bool:
    """Whether an overload is a listed operator, takes plain values, and writes into its first argument at most."""
    name = schema(found).name.removeprefix("aten::")
    if name not in _FUNCTIONAL | _IN_PLACE or not has_kernel(found):
        return False
    if torch.Tag.nondeterministic_seeded in found.tags and name not in _DRAWS_IN_TRAINING:
        return False
    written = [
        argument
        for argument in schema(found).arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written != (schema(found).arguments[:1] if name in _IN_PLACE else []):
        return False
    return all(_is_plain(str(argument.type)) for argument in schema(found).arguments)


def _is_plain(kind: str) -> bool:
    """Whether the type of an argument is a tensor, a number, a text, or an optional or a list of these."""
    while kind.startswith(("Optional[", "List[")):
        kind = kind.partition("[")[2][:-1]
    return kind in _ARGUMENTS


def use_checked(graph_module: GraphModule) -> None:
    """Call, in place, the checked operator where a graph calls the kernel behind it, and zeros for memory as it lies.

    Raises:
        ValueError: a node reads what only the unchecked kernel gives.
    """
    for owner in graph_module.modules():
        if not isinstance(owner, GraphModule):
            continue
        for node in list(owner.graph.nodes):
            if node.target in _BATCH_NORMS:
                _use_batch_norm(node)
            elif node.target in _TWINS:
                node.target = _TWINS[node.target]
                node.kwargs = {
                    name: value
                    for name, value in node.kwargs.items()
                    if any(name == argument.name for argument in schema(node.target).arguments)
                }
        owner.recompile()


_TWINS: dict[Any, OpOverload] = {
    aten._unsafe_index.Tensor: aten.index.Tensor,
    aten._unsafe_view.default: aten.reshape.default,
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}


_BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.no_stats)


def _use_batch_norm(node: Node) -> None:
    """Its kernel reads a weight or bias that is too short beyond its end; the operator in front compares them first."""
    found = schema(cast(OpOverload, node.target))
    bound = dict(zip((argument.name for argument in found.arguments), node.args)) | node.kwargs
    names = ("input", "weight", "bias", "running_mean", "running_var")
    args = (*(bound.get(name) for name in names), bound.get("training", False), bound["momentum"], bound["eps"], True)
    with node.graph.inserting_before(node):
        new = node.graph.call_function(aten.batch_norm.default, args)
    new.meta = dict(node.meta)
    for user in list(node.users):
        first = user.target is operator.getitem and user.args[1] == 0
        if not first and user.users:
            raise ValueError(f"{user.name} reads the statistics of a batch norm")
        if first:
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
