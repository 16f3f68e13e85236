"""Where per-channel factors and shifts go: one dataflow analysis for every affine map that a graph's constants could
take in.

Each element of an activation carries a *label*: the channel of the source (a norm, a Linear) whose factor it has.
Operators that only move elements are run on the labels themselves; the few others that commute with a factor have a
rule each. What reads a labelled value and has no rule is a *reader*: a Linear can undo the factor in its columns,
anything else forbids it.

`x -> x / factor` passes more operators than `x -> (x - shift) / factor` does. Norms are rewritten with both, so for
them an operator that carries the factor alone is a reader like any other (`affine=True`).

Long because the analysis is its rules, one per kind of operator, and each is judged against the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from repquant_fx.errors import InputError
from repquant_fx.passes.base import aten, attribute, dtypes_of, is_tensor, module_path, shape_of
from repquant_fx.passes.caches import appended, axis_of, constant_along, lengthened
from repquant_fx.passes.operators import (
    CASTS,
    HOMOGENEOUS,
    INDEXING,
    LAYOUT,
    MASKS,
    MATMULS,
    MOVES,
    PADS,
    POOLS,
    REDUCTIONS,
    ROW_WISE,
    SOFTMAX,
)
from repquant_fx.torch_private import size_hint

FIXED = 0  # label of elements that no factor may touch
PADDING = -1  # label of zeros put in: any factor leaves them zero, a shift does not

VANISHES = -1e4  # a logit of this much or less has the probability zero beside ordinary ones


class Ties:
    """Labels whose factors must be equal, or inverse, to one another: union-find with signs.

    A label tied to `FIXED`, or to its own inverse, has the factor 1.
    """

    def __init__(self) -> None:
        self._parent: dict[int, tuple[int, int]] = {}

    def find(self, label: int) -> tuple[int, int]:
        """(representative, sign): the label's factor is the representative's to the power of the sign."""
        path, sign = [], 1
        while label in self._parent:
            path.append(label)
            label = self._parent[label][0]
        for node in reversed(path):  # nearest to the root first
            parent, own = self._parent[node]
            sign = own * (1 if parent == label else self._parent[parent][1])
            self._parent[node] = (label, sign)
        return label, (self._parent[path[0]][1] if path else 1)

    def tie(self, a: int, b: int, sign: int = 1) -> None:
        """Make the factor of `a` that of `b` to the power `sign`."""
        (ra, sa), (rb, sb) = self.find(a), self.find(b)
        if ra == rb:
            if sa != sb * sign and ra != FIXED:
                self._parent[ra] = (FIXED, 1)
            return
        if ra == FIXED:
            ra, rb = rb, ra
        self._parent[ra] = (rb, sa * sb * sign)

    def fix(self, labels: Tensor) -> None:
        """Give all of `labels` the factor 1."""
        for label in torch.unique(labels).tolist():
            if label > 0:
                self.tie(label, FIXED)

    def tie_all(self, a: Tensor, b: Tensor, sign: int = 1) -> None:
        """Tie two label tensors of one shape, element by element; padding ties nothing."""
        pairs = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1)
        for x, y in pairs.T.tolist():
            if x != PADDING and y != PADDING:
                self.tie(x, y, sign)


@dataclass
class Reader:
    """A node that reads a labelled value and lets it go no further.

    Attributes:
        labels: of the value, in its shape at the example sizes.
        shifted: whether a shift reaches this reader too (but for padding).
        reason: why the operator stops it, '' for an ordinary one.
    """

    node: Node
    value: Node
    labels: Tensor
    shifted: bool
    reason: str = ""

    @property
    def columns(self) -> Tensor | None:
        """Label of each entry of the last axis where it is the same everywhere (but for padding); else None."""
        return constant_over(self.labels, list(range(self.labels.ndim - 1)))

    @property
    def padded(self) -> bool:
        return bool((self.labels == PADDING).any())


@dataclass
class Product:
    """A MatMul whose two operands are labelled along the axis it sums over: their factors must cancel.

    Attributes:
        left, right: label of each summed entry, broadcast to one shape (..., K).
        shifted: whether the right operand carries a shift.
    """

    node: Node
    left: Tensor
    right: Tensor
    shifted: bool


class ChannelFlow:
    """The analysis, run on construction.

    Args:
        sources: label of each channel (the last axis) of the values to start from, shape (channels,).
        affine: follow a factor and a shift together, through operators that carry both.

    Attributes:
        readers, products: in graph order.
        ties: what the operators ask of the factors.
        averaged: labels that passed a MatMul with a Softmax, whose rows sum to 1.
    """

    def __init__(self, graph_module: GraphModule, sources: Mapping[Node, Tensor], *, affine: bool = False) -> None:
        self.graph_module, self.affine = graph_module, affine
        self._dtypes = {dtype for source in sources for dtype in dtypes_of(source)}
        # labels, with one entry along axes where they do not change; a tuple for several results
        self._patterns: dict[Node, Any] = {}
        self.readers: list[Reader] = []
        self.products: list[Product] = []
        self.ties = Ties()
        self.averaged: set[int] = set()
        self._shifted: set[Node] = set()
        for node in graph_module.graph.nodes:
            carriers = [p for p in node.all_input_nodes if p in self._patterns]
            if carriers and node.target is not aten.sym_size.int:
                self._visit(node, carriers)
            if node in sources:
                self._patterns[node] = sources[node].int()
                self._shifted.add(node)

    def labels(self, node: Node) -> Tensor | None:
        """Labels of a value, in its shape at the example sizes; None where it carries none."""
        pattern = self._patterns.get(node)
        return pattern.expand(hinted(node)) if isinstance(pattern, Tensor) else None

    def pattern(self, node: Node) -> Tensor | None:
        """Labels of a value with a single entry along each axis on which they do not change."""
        pattern = self._patterns.get(node)
        return (
            pattern.reshape((1,) * (len(shape_of(node)) - pattern.ndim) + pattern.shape)
            if isinstance(pattern, Tensor)
            else None
        )

    def _visit(self, node: Node, carriers: list[Node]) -> None:
        result, shifted = None, False
        # constants in another precision are no weights that could take a factor
        if node.op == "call_function" and not is_empty(node) and dtypes_of(node) <= self._dtypes:
            try:
                result, shifted = self._through(node)
                if isinstance(result, Tensor):
                    hinted(node)  # labels are read at the example sizes
            except _Unknown:
                result = None
        if result is _CANCELLED:
            return
        shifted = shifted and all(p in self._shifted for p in carriers)
        if result is None or (self.affine and not shifted):
            why = "it is an output of the model" if node.op == "output" else ""
            for value in carriers:
                labels = self.labels(value)
                if labels is not None:
                    self.readers.append(Reader(node, value, labels, value in self._shifted, why))
            return
        self._patterns[node] = _pattern(result) if isinstance(result, Tensor) else result
        if shifted:
            self._shifted.add(node)

    def _through(self, node: Node) -> tuple[Any, bool]:
        """(labels of the result, whether a shift passes as well); None for the labels where the factors do not pass."""
        target = node.target
        if target in MOVES:
            return self._move(node), True
        if target in CASTS:
            return self._only(node), True
        if target in PADS:
            return self._pad(node), True
        if target in INDEXING:
            return self._index(node), True
        if target in REDUCTIONS:
            return self._reduce(node), REDUCTIONS[target] and not self._padded(node.args[0])  # type: ignore[index]
        if target in POOLS:
            return self._pool(node), target is not aten.avg_pool2d.default and not self._padded(node.args[0])
        if target in HOMOGENEOUS:
            return self._only(node), False
        if target in (aten.mul.Tensor, aten.div.Tensor):
            return self._multiply(node), False
        if target in (aten.add.Tensor, aten.sub.Tensor):
            return self._add(node), False
        if target in MATMULS:
            return self._matmul(node)
        return None, False

    # ---- one rule an operator ---------------------------------------------------------------------------------------

    def _move(self, node: Node) -> Any:
        """Run the operator on the labels; other tensors it takes in are fixed. A cache has those of what is appended.
        """
        if (new := appended(node)) is not None and new in self._patterns:
            labels, axis = self._known(new), axis_of(node)
            return lengthened(labels, axis, hinted(node)[axis]) if constant_along(labels, axis) else None
        args, kwargs = map_arg((node.args, node.kwargs), self._concrete)
        result = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return tuple(result) if isinstance(result, (list, tuple)) else result

    def _concrete(self, node: Node) -> Any:
        if node in self._patterns:
            labels = self.labels(node)
            return self._patterns[node] if labels is None else labels
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return hint(value)
        if not isinstance(value, Tensor):
            raise _Unknown
        return torch.full([hint(size) for size in value.shape], FIXED, dtype=torch.int32)

    def _pad(self, node: Node) -> Tensor | None:
        given: tuple[Any, ...] = node.args
        mode = node.kwargs.get("mode", given[2] if len(given) > 2 and node.target is aten.pad.default else "constant")
        value = node.kwargs.get("value", given[-1] if len(given) > 2 and not isinstance(given[-1], str) else 0)
        if mode != "constant" or value not in (0, None):
            return None
        widths = map_arg(given[1], self._concrete)
        return torch.constant_pad_nd(self._only(node), list(widths), PADDING)

    def _index(self, node: Node) -> Tensor | None:
        """Constant indices select labels; computed ones may select anything, so the labels must not depend on what they
        select.
        """
        labels = self._only(node)
        if node.target is aten.index_select.default:
            dims, indices = [int(cast(int, node.args[1])) % labels.ndim], [node.args[2]]
        else:
            indices = list(cast(Any, node.args[1]))
            dims = [i for i, index in enumerate(indices) if index is not None]
        if labels is None or any(is_tensor(i) and _node(i) in self._patterns for i in indices):
            return None
        constant = [i is None or (isinstance(i, Node) and i.op == "get_attr") for i in indices]
        if not all(constant):
            if self._padded(node.args[0]):
                return None  # what is selected may be a zero put in, or not
            if (
                any(i is not None and _node(i).meta["val"].dtype == torch.bool for i in indices)
                or constant_over(labels, dims) is None
            ):
                return None
        real = [None if i is None else attribute(self.graph_module, _node(i)) if ok else
                torch.zeros(hinted(_node(i)), dtype=torch.int64) for i, ok in zip(indices, constant)]
        if node.target is aten.index_select.default:
            return labels.index_select(dims[0], cast(Tensor, real[0]))
        return aten.index.Tensor(labels, real)

    def _reduce(self, node: Node) -> Tensor | None:
        labels, given = self._only(node), cast(Any, node.args)
        wanted = given[1] if len(given) > 1 and given[1] not in (None, []) else list(range(labels.ndim))
        dims = [int(d) % labels.ndim for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
        keep = bool(given[2]) if len(given) > 2 else bool(node.kwargs.get("keepdim", False))
        return None if constant_over(labels, dims) is None else labels.amax(dims, keepdim=keep)

    def _pool(self, node: Node) -> Tensor | None:
        if not is_tensor(node):
            return None
        labels = self._only(node)
        column = constant_over(labels, [labels.ndim - 2, labels.ndim - 1])
        return None if column is None else column[..., None, None].expand(hinted(node))

    def _multiply(self, node: Node) -> Tensor | None:
        a, b = node.args[:2]
        both = [isinstance(x, Node) and x in self._patterns for x in (a, b)]
        if all(both) or (both[1] and node.target is aten.div.Tensor):
            return None
        return self._known(_node(a if both[0] else b)).expand(hinted(node))

    def _add(self, node: Node) -> Tensor | None:
        if not all(isinstance(x, Node) and x in self._patterns for x in node.args[:2]):
            return None
        a, b = (self._known(_node(x)).expand(hinted(node)) for x in node.args[:2])
        if not self.affine:
            self.ties.tie_all(a, b)
        return torch.where(a == PADDING, b, a)

    def _matmul(self, node: Node) -> tuple[Any, bool]:
        left, right = (_node(a) for a in node.args[:2])
        a, b = self.labels(left), self.labels(right)
        if a is not None and b is not None:
            return self._product(node, a, b, right in self._shifted), False
        if b is not None:
            columns = constant_over(b, [b.ndim - 2]) if b.ndim > 1 else None
            if columns is None:
                return None, False
            sums_to_one = softmax_behind(left) is not None
            if sums_to_one:
                self.averaged.update(torch.unique(columns).tolist())
            return columns.unsqueeze(-2).expand(hinted(node)), sums_to_one and not self._padded(right)
        rows = constant_over(self._known(left), [len(shape_of(left)) - 1])
        return (None if rows is None else rows.unsqueeze(-1).expand(hinted(node))), False

    def _product(self, node: Node, a: Tensor, b: Tensor, shifted: bool) -> Any:
        if self.affine or a.ndim < 2 or b.ndim < 2:
            return None
        left, right = constant_over(a, [a.ndim - 2]), constant_over(b, [b.ndim - 1])
        if left is None or right is None:
            return None
        left, right = torch.broadcast_tensors(left, right)
        self.ties.tie_all(left, right, -1)
        self.products.append(Product(node, left, right, shifted and not self._padded(node.args[1])))
        return _CANCELLED

    def _padded(self, node: Any) -> bool:
        """Whether zeros put in are among a value's elements.

        What combines them with others still carries a factor, which leaves them zero; a shift never reached them.
        """
        labels = self._patterns.get(node)
        return isinstance(labels, Tensor) and bool((labels == PADDING).any())

    def _only(self, node: Node) -> Tensor:
        return self._known(_node(node.args[0]))

    def _known(self, node: Node) -> Tensor:
        labels = self.labels(node)
        if labels is None:
            raise _Unknown
        return labels


class _Unknown(InputError):
    """A size or value that is not known at compile time."""

    def __init__(self) -> None:
        super().__init__(
            "a size of the graph depends on values; give a model whose shapes follow from its inputs' shapes"
        )


_CANCELLED = object()  # the factors of both operands cancel


def _pattern(labels: Tensor) -> Tensor:
    """Labels with a single entry along each axis on which they do not change."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1 and (labels.stride(axis) == 0 or bool((labels == first).all())):
            labels = first
    return labels.clone() if labels.untyped_storage().nbytes() > 4 * labels.numel() else labels


def constant_over(labels: Tensor, dims: list[int]) -> Tensor | None:
    """`labels` without `dims`, where they are the same (but for padding) all along them; else None."""
    if not dims:
        return labels
    largest = labels.amax(dims, keepdim=True)
    same = (labels == largest) | (labels == PADDING)
    return largest.squeeze(dims) if bool(same.all()) else None


def hint(size: int | torch.SymInt) -> int:
    """A size, a symbolic one at its example value."""
    value = size_hint(size)
    if value is None:
        raise _Unknown
    return value


def hinted(node: Node) -> list[int]:
    """The shape of a tensor-valued node at the example sizes."""
    return [hint(size) for size in shape_of(node)]


def origin(value: Node) -> Node:
    """Go back through operators that only change the layout of their one tensor input."""
    while value.op == "call_function" and value.target in LAYOUT and isinstance(value.args[0], Node):
        value = value.args[0]
    return value


def softmax_behind(value: Node) -> Node | None:
    """The Softmax over the last axis that made `value`, through operators that leave that axis as it is."""
    while value.op == "call_function" and is_tensor(value):
        if value.target in SOFTMAX:
            return value if int(cast(int, value.args[1])) % len(shape_of(value)) == len(shape_of(value)) - 1 else None
        source = value.args[0] if value.args else None
        if value.target not in (aten.reshape.default, aten.expand.default, aten.unsqueeze.default) or not is_tensor(
            source
        ):
            return None
        if shape_of(_node(source))[-1] != shape_of(value)[-1]:
            return None
        value = _node(source)
    return None


def leads_to_softmax(graph_module: GraphModule, product: Node) -> bool:
    """Whether all that reads a MatMul is a Softmax over its last axis, through scaling, masks and layout that keep its
    rows apart.

    What is added to a whole row of logits then changes nothing; a mask that fills some of them must fill in what
    vanishes in a Softmax.
    """
    pending, reached = [product], False
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target is aten.sym_size.int:
                continue
            if user.target in SOFTMAX and int(cast(int, user.args[1])) % len(shape_of(node)) == len(shape_of(node)) - 1:
                reached = True
            elif user.target in MASKS and not _vanishes(graph_module, user, node):
                return False
            elif (
                user.target in ROW_WISE
                and (user.args[0] is node or user.target in (aten.add.Tensor, aten.where.self))
                and shape_of(user)[-1] == shape_of(node)[-1]
            ):
                pending.append(user)
            elif user.target in (aten.mul.Tensor, aten.div.Tensor) and user.args[0] is node \
                    and not (is_tensor(user.args[1]) and shape_of(_node(user.args[1]))[-1:] not in ([], [1])):
                pending.append(user)
            else:
                return False
    return reached


def _vanishes(graph_module: GraphModule, mask: Node, logits: Node) -> bool:
    """Whether what a mask puts in place of some logits is so low that a Softmax makes nothing of it."""
    fill = mask.args[2] if mask.target is not aten.where.self or mask.args[1] is logits else mask.args[1]
    while isinstance(fill, Node) and fill.target in LAYOUT | CASTS:
        fill = fill.args[0]
    if isinstance(fill, Node) and fill.target in (aten.full_like.default, aten.full.default):
        fill = fill.args[1]
    if isinstance(fill, Node):
        return fill.op == "get_attr" and bool((attribute(graph_module, fill) <= VANISHES).all())
    return isinstance(fill, (int, float)) and fill <= VANISHES


def is_empty(node: object) -> bool:
    """Whether a value is a tensor without elements, whatever its free sizes."""
    return is_tensor(node) and any(size == 0 for size in shape_of(cast(Node, node)) if isinstance(size, int))


def describe_reader(reader: Reader) -> str:
    """The reader in words, for reports."""
    node = reader.node
    name = (
        "the output"
        if node.op == "output"
        else str(node.target).split(".")[1]
        if "." in str(node.target)
        else node.name
    )
    path = module_path(node)
    return f"{name} in {path}" if path else name


def _node(value: Any) -> Node:
    if not isinstance(value, Node):
        raise _Unknown
    return value
