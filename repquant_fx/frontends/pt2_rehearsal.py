"""A program is rehearsed on fake tensors before any of its kernels runs: shapes, sizes and what kernels do not check.

Every shape is derived anew from the tensors that the file holds; what the file says about them must agree.
FakeTensor refuses what does not fit, the size of each intermediate result is bounded, and the checks below stand in for
kernels that read beyond the end of a short weight or take any number for a mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.divisions import check_divisor, is_division_of_integers, risky_values
from repquant_fx.frontends.pickled import first_line
from repquant_fx.frontends.pt2_operators import is_safe_operator
from repquant_fx.torch_private import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    UnsupportedOperatorException,
    pytree,
    schema,
    shape_environment,
    value_errors,
)

aten = torch.ops.aten
higher = torch.ops.higher_order
_LARGEST_SHIFT, _LARGEST = 64, 2**63
_SCALES = (1e-3, 1e3)  # of an interpolation
_VALUES_DECIDE = value_errors()


def rehearse(program: ExportedProgram, inputs: tuple[Tensor, ...], where: str) -> None:
    """Run a program on fake tensors with the shapes of its weights and of `inputs`; nothing is computed.

    Raises:
        ModelFileError: what the program declares is not what it holds, or a node does not fit its arguments.
        InputError: an intermediate result is larger than this machine.
    """
    values = _tensors(program, inputs, where)
    mode = FakeTensorMode(allow_fallback_kernels=False, shape_env=shape_environment())
    fake = [
        mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, Tensor) else value for value in values
    ]
    rehearsal = _Rehearsal(program.graph_module, where, _stored(program, values))
    with torch.no_grad(), mode, _Watched(where):
        rehearsal.run(*fake)


def _stored(program: ExportedProgram, values: list[Any]) -> dict[Node, frozenset[int]]:
    """Of the tensors of the file that a run leaves as they are, what no integer should be divided by."""
    signature = program.graph_signature
    changed = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    placeholders = (node for node in program.graph_module.graph.nodes if node.op == "placeholder")
    given = zip(placeholders, signature.input_specs, values, strict=True)
    return {
        node: risky_values(value)
        for node, spec, value in given
        if spec.kind != InputKind.USER_INPUT and isinstance(value, Tensor) and spec.target not in changed
    }


def _tensors(program: ExportedProgram, inputs: tuple[Tensor, ...], where: str) -> list[Any]:
    """One value per placeholder, as stored; the shapes and types that the program declares for them must be theirs."""
    given = iter(inputs)
    placeholders = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    values: list[Any] = []
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        declared = node.meta.get("val")
        if spec.kind == InputKind.USER_INPUT and isinstance(declared, Tensor):
            value = next(given, None)
        elif spec.kind == InputKind.USER_INPUT:
            value = declared
        else:
            source = program.constants if spec.target in program.constants else program.state_dict
            value = source.get(str(spec.target))
        name = str(spec.target or node.name)
        if isinstance(declared, Tensor) or spec.kind != InputKind.USER_INPUT:
            _check_declared(declared, value, spec.kind != InputKind.USER_INPUT, f"{where}: {name}")
        values.append(value)
    if next(given, None) is not None:
        raise ModelFileError(f"{where} was stored with more example inputs than the program takes")
    return values


def _check_declared(declared: Any, value: Any, is_static: bool, what: str) -> None:
    if not isinstance(value, Tensor) or not isinstance(declared, Tensor):
        raise ModelFileError(f"{what} is declared but not stored as a tensor")
    fits = (
        len(declared.shape) == len(value.shape)
        and declared.dtype == value.dtype
        and all(
            wanted == size if isinstance(wanted, int) else not is_static
            for wanted, size in zip(declared.shape, value.shape)
        )
    )
    if not fits:
        raise ModelFileError(f"{what} is declared as {_described(declared)} and stored as {_described(value)}")


def _described(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')}{[size if isinstance(size, int) else '?' for size in tensor.shape]}"
    )


class _Rehearsal(Interpreter):
    """Runs a graph node by node; the functions that take subgraphs run these the same way."""

    def __init__(self, module: GraphModule, where: str, stored: Mapping[Node, frozenset[int]]) -> None:
        super().__init__(module)
        self.where, self.stored = where, stored
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        try:
            if n.op == "call_function" and is_division_of_integers(n.target, *self.fetch_args_kwargs_from_env(n)):
                check_divisor(n, self.stored)
            return super().run_node(n)
        except InputError:
            raise
        except _VALUES_DECIDE as error:
            raise ModelFileError(
                f"{self.where}: the sizes behind the node {n.name} ({_spelled(n.target)}) depend on values; "
                "export a model whose shapes follow from its inputs' shapes"
            ) from error
        except UnsupportedOperatorException as error:
            raise ModelFileError(
                f"{self.where}: the shape of {n.name} ({_spelled(n.target)}) cannot be known before it runs"
            ) from error
        except Exception as error:
            raise ModelFileError(
                f"{self.where}: the node {n.name} ({_spelled(n.target)}) does not fit its arguments: "
                f"{first_line(error)}"
            ) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is higher.wrap_with_set_grad_enabled:
            return self._nested(args[1], args[2:])
        if target is higher.wrap_with_autocast:
            with torch.autocast("cpu", dtype=args[1], enabled=bool(args[2])):
                return self._nested(args[4], args[5:])
        if target is higher.cond:
            branches = [self._nested(branch, args[3]) for branch in args[1:3]]
            return branches[0]
        if isinstance(target, OpOverload):
            if not is_safe_operator(target):
                raise ModelFileError(f"{self.where}: {target} is not an operator that inference needs")
            _check(target, args, kwargs)
            return super().call_function(target, args, kwargs)
        _check_numbers(target.__name__, args)
        result = super().call_function(target, args, kwargs)
        if type(result) in (int, float) and not abs(result) < _LARGEST:
            raise ValueError("its result is too large for a size")
        return result

    def _nested(self, module: Any, args: Any) -> Any:
        if not isinstance(module, GraphModule):
            raise ValueError("it takes a graph")
        return _Rehearsal(module, self.where, {}).run(*args)


def _spelled(target: Any) -> str:
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def _check_numbers(name: str, args: tuple[Any, ...]) -> None:
    """Arithmetic of sizes takes numbers; a list times a number, or a power of a power, would take the memory."""
    if name == "getitem":
        if len(args) != 2 or not isinstance(args[0], (tuple, list)) or type(args[1]) is not int:
            raise ValueError("it picks an item of what is no sequence")
        return
    if not all(isinstance(arg, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) for arg in args):
        raise ValueError("it is arithmetic of sizes and takes numbers")
    if name in ("pow", "lshift", "rshift") and not (type(args[-1]) in (int, float) and abs(args[-1]) <= _LARGEST_SHIFT):
        raise ValueError(f"its exponent is not a number up to {_LARGEST_SHIFT}")


class _Watched(TorchDispatchMode):
    """Judges each kernel that a composite operator comes to, and the size of what it gives."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and all(isinstance(size, int) for size in leaf.shape):
                limits.check_size(leaf.shape, f"{self.where}: a result of {func}", leaf.element_size())
        return result


def _check(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    check = _CHECKS.get(schema(func).name.removeprefix("aten::"))
    if check is not None:
        arguments = schema(func).arguments
        check(
            {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), args)) | dict(kwargs)
        )


Bound = Mapping[str, Any]


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def _batch_norm(bound: Bound) -> None:
    channels = bound["input"].shape[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = bound.get(name)
        _need(value is None or tuple(value.shape) == (channels,), f"its {name} does not have {channels} elements")


def _layer_norm(bound: Bound) -> None:
    for name in ("weight", "bias"):
        value = bound.get(name)
        _need(
            value is None or tuple(value.shape) == tuple(bound["normalized_shape"]),
            f"its {name} has another shape than what is normalized",
        )


def _group_norm(bound: Bound) -> None:
    shape = bound["input"].shape
    _need(
        len(shape) >= 2 and bound["N"] == shape[0] and bound["C"] == shape[1] and bound["HxW"] == math.prod(shape[2:]),
        "its sizes are not those of its input",
    )
    _need(bound["group"] > 0 and bound["C"] % bound["group"] == 0, "its groups do not divide its channels")
    for name in ("weight", "bias"):
        value = bound.get(name)
        _need(value is None or tuple(value.shape) == (shape[1],), f"its {name} does not have {shape[1]} elements")


def _attention(bound: Bound) -> None:
    query, key, value, mask = bound["query"], bound["key"], bound["value"], bound.get("attn_mask")
    _need(
        min(query.ndim, key.ndim, value.ndim) >= 2
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2],
        "its queries, keys and values do not fit each other",
    )
    grouped = -3 if bound.get("enable_gqa") else -2  # heads that several queries share are fewer
    torch.broadcast_shapes(query.shape[:grouped], key.shape[:grouped], value.shape[:grouped])
    _need(
        grouped == -2 or all(heads > 0 and query.shape[-3] % heads == 0 for heads in (key.shape[-3], value.shape[-3])),
        "its heads do not fit each other",
    )
    if mask is not None:
        wanted = (
            *torch.broadcast_shapes(query.shape[:-2], key.shape[:-2] if grouped == -2 else ()),
            query.shape[-2],
            key.shape[-2],
        )
        _need(torch.broadcast_shapes(mask.shape, wanted) == wanted, "its mask does not fit")


def _interpolation(bound: Bound) -> None:
    """Kernels compute from the scale where they read, some without looking where the input ends."""
    given = [value for name, value in bound.items() if name.startswith("scale") and value is not None]
    scales = [scale for value in given for scale in (value if isinstance(value, (list, tuple)) else [value])]
    _need(
        all(isinstance(scale, (int, float)) and _SCALES[0] <= scale <= _SCALES[1] for scale in scales),
        "its scale is not between 0.001 and 1000",
    )
    sizes = bound.get("output_size")
    before = bound["input" if "input" in bound else "self"].shape[2:]
    if sizes is not None and scales:
        named = [bound[name] for name in ("scales", "scales_d", "scales_h", "scales_w") if name in bound]
        _need(
            len(named) == len(sizes) == len(before)
            and all(s is None or abs(old * s - new) <= 1 for old, s, new in zip(before, named, sizes)),
            "its scale is not that of its sizes",
        )


def _pool(bound: Bound) -> None:
    divisor = bound.get("divisor_override")
    _need(divisor is None or divisor > 0, "its divisor is not above 0")


def _range(bound: Bound) -> None:
    """Its kernel, even the fake one, divides the difference of the ends by the step."""
    numbers = [bound.get(name) for name in ("start", "end", "step")]
    _need(all(abs(number) < _LARGEST // 2 for number in numbers if isinstance(number, int)), "its ends are too large")


def _shuffle(bound: Bound) -> None:
    channels, groups = bound["self"].shape[1], bound["groups"]
    _need(groups > 0 and channels % groups == 0, "its groups do not divide its channels")


def _grid(bound: Bound) -> None:
    _need(
        bound["interpolation_mode"] in (0, 1, 2) and bound["padding_mode"] in (0, 1, 2),
        "its mode is none that is known",
    )


def _strided(bound: Bound) -> None:
    sizes, strides, storage = bound["size"], bound["stride"], bound["self"].untyped_storage().nbytes()
    offset = bound["storage_offset"] if bound["storage_offset"] is not None else bound["self"].storage_offset()
    _need(
        len(sizes) == len(strides) and all(value >= 0 for value in (*sizes, *strides, offset)),
        "its sizes and strides are those of no tensor",
    )
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1 if math.prod(sizes) else 0
    _need(last * bound["self"].element_size() <= storage, "it views what lies behind its tensor")


_CHECKS: dict[str, Callable[[Bound], None]] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "arange": _range,
    "avg_pool2d": _pool,
    "avg_pool3d": _pool,
    "channel_shuffle": _shuffle,
    "native_channel_shuffle": _shuffle,
    "grid_sampler": _grid,
    "grid_sampler_2d": _grid,
    "as_strided": _strided,
    **dict.fromkeys(
        (
            f"{front}{name}"
            for front in ("upsample_", "_upsample_")
            for name in (
                "bicubic2d",
                "bilinear2d",
                "linear1d",
                "nearest1d",
                "nearest2d",
                "nearest3d",
                "nearest_exact1d",
                "nearest_exact2d",
                "nearest_exact3d",
                "trilinear3d",
                "bicubic2d_aa",
                "bilinear2d_aa",
            )
        ),
        _interpolation,
    ),
}
