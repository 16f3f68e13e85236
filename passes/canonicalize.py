"""Canonicalize: one spelling for each operation, so that matchers need to know one.

Identities left behind by export disappear; views become reshapes; a matrix product with a parameter becomes a Linear,
other ways to write a product a MatMul; a convolution whose windows tile its input (a patch embedding) becomes a Linear
over unfolded patches, which is what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.naming import PATCHES, TRANSPOSED
from repquant_fx.ops import hold
from repquant_fx.passes.base import Pass, aten, attribute, constant_node, copy_meta, is_constant, is_tensor, shape_of
from repquant_fx.passes.channel_flow import is_empty
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import (
    ASSERTIONS,
    BOUNDS,
    CONVOLUTIONS,
    GLOBAL_POOLS,
    IDENTITIES,
    NORMS,
    PADS,
    ROUNDINGS,
    SQUEEZES,
    VIEWS,
)
from repquant_fx.passes.spec import CANONICAL, CAPTURED

# in which ONNX Runtime looks for what is not zero
SOUGHT = {torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32}


class Canonicalize(Pass):
    """Values keep their shapes and dtypes; a weight (in, out) becomes (out, in), and the kernel (out, in, h, w) of a
    convolution whose windows tile its input becomes (out, in * h * w).
    """

    name = "canonicalize"
    needs = "a captured ATen graph with tensor metadata"
    guarantees = "no identities; reshape, linear and softmax in one spelling; the outputs are unchanged"
    takes, gives = CAPTURED, CANONICAL
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function":
                modified |= self._rewrite(graph_module, node)
        if modified:
            graph_module.graph.eliminate_dead_code()
            refresh_metadata(graph_module)
        return modified

    def _rewrite(self, graph_module: GraphModule, node: Node) -> bool:
        target = node.target
        if target is aten._assert_scalar.default and not _is_bound(node.args[0]):
            node.target = hold
        elif target in ASSERTIONS:
            graph_module.graph.erase_node(node)
        elif target in IDENTITIES or self._does_nothing(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph_module.graph.erase_node(node)
        elif target in VIEWS or (target is aten.reshape.default and _one_symbol(node.args[1]) is not None):
            node.target = aten.reshape.default
            self._infer_symbol(node)
        elif (
            target in (aten.mm.default, aten.matmul.default)
            and is_constant(node.args[1])
            and len(shape_of(_n(node.args[1]))) == 2
        ):
            self._to_linear(graph_module, node, _n(node.args[0]), _n(node.args[1]), None)
        elif (
            target is aten.addmm.default
            and not node.kwargs
            and is_constant(node.args[2])
            and _is_bias(node.args[0], node)
        ):
            self._to_linear(graph_module, node, _n(node.args[1]), _n(node.args[2]), _n(node.args[0]))
        elif target in CONVOLUTIONS and len(shape_of(_n(node.args[0]))) < len(shape_of(_n(node.args[1]))):
            self._add_batch_axis(graph_module, node)
        elif target is aten.im2col.default and len(shape_of(_n(node.args[0]))) == 3:
            self._add_batch_axis(graph_module, node)
        elif target is aten.linear.default and shape_of(node)[-1] == 0:
            # whatever it computes has no elements; ONNX Runtime cannot make a Gemm of it
            node.target, node.args = aten.slice.Tensor, (node.args[0], -1, 0, 0)
        elif target is aten.conv2d.default and _tiles(node):
            self._patches_to_linear(graph_module, node)
        elif target in (aten.addmm.default, aten.baddbmm.default) and not node.kwargs:
            self._to_matmul(graph_module, node)
        elif target is aten.copy.default:
            self._copy_to_expand(graph_module, node)
        elif target in SQUEEZES and _other_sizes(node):
            node.target, node.args = aten.squeeze.dims, (node.args[0], _ones(node))
        elif target is aten.nonzero.default and _n(node.args[0]).meta["val"].dtype not in SOUGHT:
            self._cast_first(graph_module, node, torch.bool)
        elif target is aten.pow.Tensor_Scalar and _n(node.args[0]).meta["val"].dtype == torch.bool:
            self._cast_first(graph_module, node, node.meta["val"].dtype)  # ONNX has no power of booleans
        elif target is aten.einsum.default:
            return self._einsum_to_matmul(graph_module, node)
        elif target is aten.sort.default:
            _sort_stably(node)
        elif target in GLOBAL_POOLS and all(size == 1 for size in node.args[1]):  # type: ignore[union-attr]
            node.target = aten.mean.dim
            node.args = (node.args[0], GLOBAL_POOLS[target], True)  # type: ignore[index]
        else:
            if target in (aten.addmm.default, aten.baddbmm.default):
                self.leave(node, "it weights its terms (alpha, beta), which a Linear or MatMul does not")
            return False
        return True

    def _einsum_to_matmul(self, graph_module: GraphModule, node: Node) -> bool:
        product = _as_product(node)
        if isinstance(product, str):
            self.leave(node, product)
            return False
        _write_product(graph_module, node, product)
        return True

    def _does_nothing(self, node: Node) -> bool:
        if not node.args or not is_tensor(node.args[0]) or not is_tensor(node):
            return False
        source = _n(node.args[0])
        if node.target is aten._to_copy.default or node.target in (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.type_as.default,
        ):
            return source.meta["val"].dtype == node.meta["val"].dtype
        if node.target in NORMS:
            return is_empty(node)  # ONNX Runtime normalises no vectors of no elements
        if node.target in SQUEEZES:
            return len(shape_of(source)) == len(shape_of(node))
        if node.target in ROUNDINGS:
            return not source.meta["val"].is_floating_point()  # ONNX rounds no integers
        if node.target in PADS:
            return all(isinstance(p, int) and p == 0 for p in node.args[1])  # type: ignore[union-attr]
        if node.target is aten.roll.default:
            return all(isinstance(p, int) and p == 0 for p in node.args[1])  # type: ignore[union-attr]
        if node.target is aten.slice.Tensor:
            given: list[Any] = [*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1:]]
            _, start, end, step = given
            return start in (0, None) and step == 1 and bool(end is None or (isinstance(end, int) and end >= 1 << 31))
        return False

    def _infer_symbol(self, node: Node) -> None:
        """A reshape with one symbolic size infers it: the sizes become a constant in the exported file."""
        index = _one_symbol(node.args[1])
        if index is not None:
            sizes = list(node.args[1])  # type: ignore[arg-type]
            sizes[index] = -1
            node.update_arg(1, sizes)

    def _to_linear(self, graph_module: GraphModule, node: Node, x: Node, weight: Node, bias: Node | None) -> None:
        transposed = constant_node(
            graph_module, TRANSPOSED.of(str(weight.target)), attribute(graph_module, weight).T.contiguous(), node
        )
        with graph_module.graph.inserting_before(node):
            linear = graph_module.graph.call_function(aten.linear.default, (x, transposed, bias))
        copy_meta(node, linear, node.meta["val"])
        node.replace_all_uses_with(linear)
        graph_module.graph.erase_node(node)

    def _to_matmul(self, graph_module: GraphModule, node: Node) -> None:
        with graph_module.graph.inserting_before(node):
            product = graph_module.graph.call_function(aten.matmul.default, node.args[1:3])
            total = graph_module.graph.call_function(aten.add.Tensor, (product, node.args[0]))
        copy_meta(node, product, node.meta["val"])
        copy_meta(node, total, node.meta["val"])
        node.replace_all_uses_with(total)
        graph_module.graph.erase_node(node)
        self._rewrite(graph_module, product)  # with a constant it is a Linear

    def _cast_first(self, graph_module: GraphModule, node: Node, dtype: torch.dtype) -> None:
        with graph_module.graph.inserting_before(node):
            cast = graph_module.graph.call_function(aten.to.dtype, (node.args[0], dtype))
        node.update_arg(0, copy_meta(node, cast))

    def _copy_to_expand(self, graph_module: GraphModule, node: Node) -> None:
        """A copy into another tensor is one of its shape and type; the ONNX export of torch would keep the source's."""
        graph, (target, source) = graph_module.graph, node.args[:2]
        with graph.inserting_before(node):
            wide = copy_meta(node, graph.call_function(aten.expand_as.default, (source, target)))
            result = copy_meta(node, graph.call_function(aten.to.dtype, (wide, node.meta["val"].dtype)))
        node.replace_all_uses_with(result)
        graph.erase_node(node)

    def _add_batch_axis(self, graph_module: GraphModule, node: Node) -> None:
        """A convolution of one sample is one of a batch of one; so are patches of one sample."""
        graph = graph_module.graph
        with graph.inserting_before(node):
            batch = copy_meta(node, graph.call_function(aten.unsqueeze.default, (node.args[0], 0)))
        node.update_arg(0, batch)
        with graph.inserting_after(node):
            sample = copy_meta(node, graph.call_function(aten.squeeze.dim, (node, 0)), node.meta["val"])
        node.replace_all_uses_with(sample, delete_user_cb=lambda user: user is not sample)

    def _patches_to_linear(self, graph_module: GraphModule, node: Node) -> None:
        graph = graph_module.graph
        x, weight = _n(node.args[0]), _n(node.args[1])
        bias = node.args[2] if len(node.args) > 2 else None
        kernel = attribute(graph_module, weight)
        out, channels, p, q = kernel.shape
        _, _, height, width = shape_of(x)
        flat = constant_node(graph_module, PATCHES.of(str(weight.target)), kernel.reshape(out, -1), node)
        with graph.inserting_before(node):
            batch: Any = shape_of(x)[0]
            if not isinstance(batch, int):
                batch = -1  # inferred, as everywhere else
            tiles = graph.call_function(aten.reshape.default, (x, [batch, channels, height // p, p, width // q, q]))
            order = graph.call_function(aten.permute.default, (tiles, [0, 2, 4, 1, 3, 5]))
            rows = graph.call_function(
                aten.reshape.default, (order, [batch, height // p, width // q, channels * p * q])
            )
            linear = graph.call_function(aten.linear.default, (rows, flat, bias))
            result = graph.call_function(aten.permute.default, (linear, [0, 3, 1, 2]))
        for new in (tiles, order, rows, linear):
            copy_meta(node, new)
        copy_meta(node, result, node.meta["val"])  # a convolution that reads it asks for its shape
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _sort_stably(node: Node) -> None:
    """Equal elements keep their order, which torch leaves open here and ONNX does not."""
    names = ("dim", "descending")
    node.kwargs = {"stable": True, **dict(zip(names, node.args[1:])), **node.kwargs}
    node.target, node.args = aten.sort.stable, node.args[:1]


@dataclass(frozen=True)
class _Product:
    """An einsum as a MatMul that broadcasts: `left` (shared, rows, summed) @ `right` (shared, summed, column).

    Attributes:
        left, right: the operands; terms: their indices as the equation writes them.
        output: indices of the result; shared: those of both operands and the result.
        rows, columns: the operands' own (one column); summed: what is summed over.
    """

    left: Node
    right: Node
    terms: tuple[str, str]
    output: str
    shared: list[str]
    rows: list[str]
    columns: list[str]
    summed: str


def _as_product(node: Node) -> _Product | str:
    """The MatMul that an einsum is; why it is none, in words, where it is none.

    `bhwc,hkc->bhwk`: h is in both and the result, so it goes first; (h, b, w, c) @ (h, 1, c, k) gives (h, b, w, k).
    """
    equation = str(node.args[0]).replace(" ", "")
    inputs, _, output = equation.partition("->")
    terms, tensors = inputs.split(","), node.args[1]
    repeated = any(len(set(t)) < len(t) for t in (*terms, output))
    if len(terms) != 2 or not equation.isascii() or "." in equation or not output or repeated:
        return "it is no product of two tensors whose indices are all written out, each once in each"
    summed = [i for i in terms[0] if i in terms[1] and i not in output]
    shared = [i for i in output if i in terms[0] and i in terms[1]]
    own = [[i for i in output if i in term and i not in shared] for term in terms]
    if len(summed) != 1 or any(len(shared) + 1 + len(mine) != len(term) for mine, term in zip(own, terms)):
        return "it does not sum over exactly one index, which both tensors have"
    (left, rows), (right, columns) = zip(tensors, own, strict=True)  # type: ignore[arg-type]
    if len(columns) != 1:
        left, rows, right, columns, terms = right, columns, left, rows, terms[::-1]
    if len(columns) != 1 or not rows:
        return "neither tensor has exactly one index of its own beside the other's"
    if shape_of(left)[terms[0].index(summed[0])] != shape_of(right)[terms[1].index(summed[0])]:
        return "it repeats the one element along the index that it sums over, which a MatMul does not"
    return _Product(left, right, (terms[0], terms[1]), output, shared, rows, columns, summed[0])


def _write_product(graph_module: GraphModule, node: Node, product: _Product) -> None:
    graph, shared, summed = graph_module.graph, product.shared, product.summed
    left, right = ([term.index(i) for i in order] for term, order in zip(
        product.terms, ((*shared, *product.rows, summed), (*shared, summed, *product.columns))))
    with graph.inserting_before(node):
        a = graph.call_function(aten.permute.default, (product.left, left))
        b = graph.call_function(aten.permute.default, (product.right, right))
        new = [a, b]
        for _ in product.rows[1:]:
            new.append(graph.call_function(aten.unsqueeze.default, (new[-1], len(shared))))
        new.append(graph.call_function(aten.matmul.default, (a, new[-1])))
        order = [*shared, *product.rows, *product.columns]
        new.append(graph.call_function(aten.permute.default, (new[-1], [order.index(i) for i in product.output])))
    for each in new:
        copy_meta(node, each)
    node.replace_all_uses_with(new[-1])
    graph.erase_node(node)


def _is_bound(condition: Any) -> bool:
    """Whether a check of a traced program only limits a size. Where that size follows from values, the limit is the
    size of the example, and wrong beyond it.
    """
    return isinstance(condition, Node) and condition.target in BOUNDS


def _squeezed(node: Node) -> list[int]:
    """The axes that a squeeze names, or all."""
    rank = len(shape_of(_n(node.args[0])))
    given: Any = node.args[1] if len(node.args) > 1 else list(range(rank))
    return [axis % rank for axis in ([given] if isinstance(given, int) else given)]


def _ones(node: Node) -> list[int]:
    """Those of them that torch squeezes: ONNX would take the others for an error, or for 1 where they happen to be."""
    sizes = shape_of(_n(node.args[0]))
    return [axis for axis in _squeezed(node) if isinstance(sizes[axis], int) and sizes[axis] == 1]


def _other_sizes(node: Node) -> bool:
    return is_tensor(node.args[0]) and _ones(node) != _squeezed(node)


def _is_bias(added: Any, node: Node) -> bool:
    """Whether what an addmm adds is one constant per output channel, as a Linear's bias is."""
    return is_constant(added) and shape_of(added) == shape_of(node)[-1:]


def _one_symbol(sizes: Any) -> int | None:
    """Position of the only size that is not a plain number; None where there is not exactly one, or one is inferred
    already.
    """
    symbols = [i for i, size in enumerate(sizes) if isinstance(size, Node)]
    integers = [size for size in sizes if isinstance(size, int)]
    return symbols[0] if len(symbols) == 1 and -1 not in integers and 0 not in integers else None


def _n(node: Any) -> Node:
    if not isinstance(node, Node):
        raise PassError(f"expected a graph node, found {node!r}")
    return node


def _tiles(node: Node) -> bool:
    """Whether a conv2d has stride equal to its kernel, no padding, one group and an input that its windows tile."""
    args: list[Any] = list(node.args) + [None, [1, 1], [0, 0], [1, 1], 1][len(node.args) - 2:]
    x, weight, _, stride, padding, dilation, groups = args
    if not is_constant(weight) or not is_tensor(x):
        return False
    kernel = shape_of(_n(weight))[2:]
    size = shape_of(_n(x))[2:]
    pair = [s if len(s) == 2 else [s[0], s[0]] for s in (stride, padding, dilation)]
    return (
        len(size) == 2
        and list(pair[0]) == list(kernel)
        and list(pair[1]) == [0, 0]
        and list(pair[2]) == [1, 1]
        and groups == 1
        and all(isinstance(s, int) and isinstance(k, int) and s % k == 0 for s, k in zip(size, kernel))
    )
