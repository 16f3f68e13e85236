"""Where whole channel vectors go: one dataflow analysis for every rotation that a graph's constants can take in.

`channel_flow` follows single channels, which is enough for a factor. A rotation mixes the channels of a vector, so it
passes only operators that keep the vector together: token selection, windows, residual additions, concatenation along
tokens, a norm. All values that such operators join live in one *space*, and one orthogonal matrix R serves it: what
writes into the space (a Linear, an embedding, a constant) takes R into its rows, what reads it (a Linear) takes the
inverse into its columns. Whatever else meets a vector of a space fixes that space, with the reason.

Each element of a value carries the number of the vector it belongs to and its channel there; operators that only move
elements are run on these numbers, so that splits, windows and merged patches need no rule of their own.
Long because every operator has its rule here, as in `channel_flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from repquant_fx.passes.base import aten, attribute, is_constant, is_float32, is_tensor, module_path, shape_of
from repquant_fx.passes.caches import appended, axis_of, constant_along, lengthened
from repquant_fx.passes.channel_flow import PADDING, Reader, describe_reader, hint, hinted, softmax_behind
from repquant_fx.passes.norm_affine import folds
from repquant_fx.passes.operators import (
    CASTS,
    CONVOLUTIONS,
    INDEXING,
    MATMULS,
    MOVES,
    NORMS,
    PADS,
    PARAMETERS,
    REDUCTIONS,
)
from repquant_fx.passes.vector_spaces import CHANNEL_BITS, Space, Vectors


class VectorFlow:
    """The analysis, run on construction.

    Args:
        head_size: None for vectors of all channels that a layer writes (the residual stream, and what lies between
            other layers); a number for the vectors of that many channels of which a Linear writes several (the heads of
            attention).

    Attributes:
        spaces: every space that something writes into, in graph order.
    """

    def __init__(self, graph_module: GraphModule, head_size: int | None = None) -> None:
        self.graph_module, self.head_size = graph_module, head_size
        self._spaces: list[Space] = []
        self._parent: list[int] = []
        self._values: dict[Node, Any] = {}
        last_use: dict[Node, Node] = {}
        for node in graph_module.graph.nodes:
            for used in node.all_input_nodes:
                last_use[used] = node
        for node in graph_module.graph.nodes:
            if node.target is not aten.sym_size.int:
                self._visit(node)
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    self._values.pop(used, None)
        roots = dict.fromkeys(self._find(i) for i in range(len(self._spaces)))
        self.spaces = [self._spaces[root] for root in roots]

    # ---- spaces -----------------------------------------------------------------------------------------------------

    def _new(self, size: int, writer: Node, block: int) -> int:
        self._spaces.append(Space(size, [(writer, block)]))
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _find(self, space: int) -> int:
        while self._parent[space] != space:
            self._parent[space] = space = self._parent[self._parent[space]]
        return space

    def _join(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        if a == b:
            return
        one, other = self._spaces[a], self._spaces[b]
        self._parent[b] = a
        one.writers += other.writers
        one.readers += other.readers
        one.norms += [norm for norm in other.norms if norm not in one.norms]
        one.products += [product for product in other.products if product not in one.products]
        one.reason = one.reason or other.reason
        if one.size != other.size:
            one.reason = one.reason or "vectors of different lengths meet"

    def _fix(self, value: Vectors, reason: str) -> None:
        for space in value.used():
            root = self._spaces[self._find(space)]
            root.reason = root.reason or reason

    def _lines(self, value: Vectors, axis: int) -> Tensor | None:
        """Representatives of the spaces along an axis (see `Vectors.lines`)."""
        lines = value.lines(axis, [space.size for space in self._spaces])
        if lines is None:
            return None
        roots = torch.tensor([self._find(i) for i in range(len(self._spaces))] + [PADDING])
        return roots[lines]

    def _joined(self, value: Vectors, axis: int) -> list[int] | None:
        """The space of each block along an axis: all lines of a block must be of one space, so they become it."""
        lines = self._lines(value, axis)
        if lines is None:
            return None
        columns = []
        for column in lines.reshape(-1, lines.shape[-1]).unbind(1):
            spaces = [space for space in torch.unique(column).tolist() if space != PADDING]
            for other in spaces[1:]:
                self._join(spaces[0], other)
            columns.append(spaces[0] if spaces else PADDING)
        return None if PADDING in columns else [self._find(space) for space in columns]

    def _join_pairs(self, a: Tensor, b: Tensor) -> None:
        for x, y in torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1).T.tolist():
            if x != PADDING and y != PADDING:
                self._join(x, y)

    # ---- the walk ---------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        carriers = [p for p in node.all_input_nodes if p in self._values]
        handled = False
        if node.op == "call_function" and carriers and is_float32(node):
            try:
                handled = self._through(node)
            except _Stop:
                handled = False
        if not handled:
            for parent in carriers:
                for value in _flat(self._values[parent]):
                    self._fix(value, _reason(node, parent))
        self._write(node)

    def _write(self, node: Node) -> None:
        """A node that makes vectors starts spaces of its own."""
        if node.op == "get_attr":
            value = node.meta.get("val")
            if (
                self.head_size is None
                and isinstance(value, Tensor)
                and value.dtype == torch.float32
                and value.ndim
                and isinstance(value.shape[-1], int)
                and value.shape[-1] > 1
                and not all(_is_weight_of(user, node) for user in node.users)
            ):
                self._values[node] = self._vectors(list(value.shape), -1, [self._new(value.shape[-1], node, 0)])
        elif node.op == "call_function" and is_float32(node):
            axis = self._written_axis(node)
            if axis is None:
                return
            shape = hinted(node)
            size = shape[axis] if self.head_size is None else self.head_size
            if size and shape[axis] % size == 0 and (self.head_size is None or axis == -1):
                self._values[node] = self._vectors(
                    shape, axis, [self._new(size, node, block) for block in range(shape[axis] // size)]
                )

    def _written_axis(self, node: Node) -> int | None:
        if node.target is aten.linear.default and is_constant(node.args[1]):
            return -1
        if node.target is aten.embedding.default and is_constant(node.args[0]) and self.head_size is None:
            return -1
        if node.target in CONVOLUTIONS and is_constant(node.args[1]) and self.head_size is None:
            return 1 if len(shape_of(node)) == len(shape_of(cast(Node, node.args[1]))) else None
        return None

    def _vectors(self, shape: list[int], axis: int, spaces: list[int]) -> Vectors:
        """The state of a new value: along `axis` one vector after the other, one for each of `spaces`."""
        moved = [*shape]
        channels = moved.pop(axis)
        size = channels // len(spaces)
        count = int(torch.tensor(moved, dtype=torch.int64).prod()) * len(spaces)
        vectors = torch.arange(count).reshape(*moved, len(spaces), 1)
        numbers = ((vectors << CHANNEL_BITS) | torch.arange(size)).flatten(-2).movedim(-1, axis)
        return Vectors(numbers, torch.tensor(spaces).repeat(max(count // len(spaces), 1)))

    def _through(self, node: Node) -> bool:
        """Follow the vectors through an operator; False where it does not keep them together."""
        target = node.target
        if target is aten.linear.default:
            return self._read(node, -1)
        if target in CONVOLUTIONS:
            return (len(node.args) < 7 or bool(node.args[6] == 1)) and self._read(node, 1)
        if target in NORMS:
            return self._norm(node)
        if target in MOVES:
            return self._move(node)
        if target in CASTS:
            return self._keep(node, self._value(node.args[0]))
        if target in PADS:
            return self._pad(node)
        if target in INDEXING:
            return self._index(node)
        if target in REDUCTIONS and target is not aten.amax.default:
            return self._mean(node)
        if target in (aten.add.Tensor, aten.sub.Tensor):
            return self._add(node)
        if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar):
            return self._scale(node)
        if target in MATMULS:
            return self._matmul(node)
        return False

    def _keep(self, node: Node, value: Any) -> bool:
        self._values[node] = value
        return True

    def _value(self, node: object) -> Vectors:
        value = self._values.get(node) if isinstance(node, Node) else None
        if not isinstance(value, Vectors):
            raise _Stop
        return value

    # ---- one rule an operator ---------------------------------------------------------------------------------------

    def _read(self, node: Node, axis: int) -> bool:
        if not is_constant(node.args[1]) or any(
            a in self._values for a in node.all_input_nodes if a is not node.args[0]
        ):
            return False
        spaces = self._joined(self._value(node.args[0]), axis)
        if spaces is None:
            return False
        for block, space in enumerate(spaces):
            self._spaces[space].readers.append((node, block))
        return True

    def _norm(self, node: Node) -> bool:
        if self.head_size is not None or len(cast(Any, node.args[1])) != 1:
            return False
        value = self._value(node.args[0])
        lines = self._lines(value, -1)
        if lines is None:
            return False
        for space in torch.unique(lines).tolist():
            if space != PADDING and node not in self._spaces[space].norms:
                self._spaces[space].norms.append(node)
        if not folds(self.graph_module, node):
            self._fix(
                value, f"the norm {module_path(node) or node.name} has readers that cannot take its gain and bias"
            )
        return self._keep(node, value)

    def _move(self, node: Node) -> bool:
        """Run the operator on the numbers. Vectors of several operands are numbered on; a cache has those of what is
        appended.
        """
        if (new := appended(node)) is not None and isinstance(value := self._values.get(new), Vectors):
            size, axis = hinted(node)[axis_of(node)], axis_of(node)
            owners = torch.where(value.numbers >= 0, value.spaces[value.numbers >> CHANNEL_BITS], PADDING)
            if not constant_along(owners, axis):
                return False
            return self._keep(node, Vectors(lengthened(value.numbers, axis, size), value.spaces))
        spaces: list[Tensor] = []
        offset = 0

        def numbers(argument: Node) -> Any:
            nonlocal offset
            if argument not in self._values:
                value = argument.meta.get("val")
                if isinstance(value, (int, torch.SymInt)):
                    return hint(value)
                raise _Stop  # something without vectors is moved in between
            value = self._values[argument]
            if not isinstance(value, Vectors):
                return tuple(part.numbers for part in value)
            moved = torch.where(value.numbers >= 0, value.numbers + (offset << CHANNEL_BITS), PADDING)
            offset += len(value.spaces)
            spaces.append(value.spaces)
            return moved

        args, kwargs = map_arg((node.args, node.kwargs), numbers)
        result = cast(Callable[..., Any], node.target)(*args, **kwargs)
        table = torch.cat(spaces) if spaces else self._values[cast(Node, node.args[0])][0].spaces
        if isinstance(result, (list, tuple)):
            return self._keep(node, tuple(Vectors(part, table) for part in result))
        return self._keep(node, Vectors(result, table))

    def _pad(self, node: Node) -> bool:
        given: tuple[Any, ...] = node.args
        mode = node.kwargs.get("mode", given[2] if len(given) > 2 and node.target is aten.pad.default else "constant")
        fill = node.kwargs.get("value", given[-1] if len(given) > 2 and not isinstance(given[-1], str) else 0)
        if mode != "constant" or fill not in (0, None):
            return False
        value = self._value(given[0])
        widths = [hint(w) if isinstance(w, (int, torch.SymInt)) else hint(w.meta["val"]) for w in given[1]]
        return self._keep(node, Vectors(torch.constant_pad_nd(value.numbers, widths, PADDING), value.spaces))

    def _index(self, node: Node) -> bool:
        """Constant indices select vectors; computed ones may select any, so all must be of one space."""
        value = self._value(node.args[0])
        if node.target is aten.index_select.default:
            indices: list[Any] = [None] * (int(cast(int, node.args[1])) % value.numbers.ndim) + [node.args[2]]
        else:
            indices = list(cast(Any, node.args[1]))
        if any(isinstance(i, Node) and i in self._values for i in indices):
            return False
        computed = [i for i in indices if i is not None and not is_constant(i)]
        if computed and (len(value.used()) > 1 or any(i.meta["val"].dtype == torch.bool for i in computed)):
            return False
        real = [
            None
            if i is None
            else attribute(self.graph_module, i)
            if is_constant(i)
            else torch.zeros(hinted(i), dtype=torch.int64)
            for i in indices
        ]
        return self._keep(node, Vectors(aten.index.Tensor(value.numbers, real), value.spaces))

    def _mean(self, node: Node) -> bool:
        """A sum over whole vectors is a vector of the same space."""
        value, given = self._value(node.args[0]), cast(Any, node.args)
        wanted = given[1] if len(given) > 1 and given[1] not in (None, []) else list(range(value.numbers.ndim))
        dims = [int(d) % value.numbers.ndim for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
        axis = self._axis(value)
        if axis in dims:
            return False
        numbers = value.numbers.amax(dims, keepdim=True)  # not padding, where there is anything else
        keep = bool(given[2]) if len(given) > 2 else bool(node.kwargs.get("keepdim", False))
        return self._keep(node, Vectors(numbers if keep else numbers.squeeze(dims), value.spaces))

    def _axis(self, value: Vectors) -> int:
        """The axis along which a value holds whole vectors."""
        for axis in (value.numbers.ndim - 1, 1):
            if axis < value.numbers.ndim and self._lines(value, axis) is not None:
                return axis
        raise _Stop

    def _add(self, node: Node) -> bool:
        if node.kwargs.get("alpha", 1) != 1 or not all(is_tensor(a) for a in node.args[:2]):
            return False
        values = [self._value(a) for a in node.args[:2]]
        shape = hinted(node)
        wide = [Vectors(v.numbers.expand(shape), v.spaces) for v in values]
        axis = self._axis(wide[0])
        one, other = (self._lines(v, axis) for v in wide)
        if one is None or other is None or one.shape != other.shape:
            return False
        self._join_pairs(one, other)
        further = wide[1].numbers + (len(wide[0].spaces) << CHANNEL_BITS)
        return self._keep(node, Vectors(torch.where(wide[0].numbers >= 0, wide[0].numbers,
                                                     torch.where(wide[1].numbers >= 0, further, PADDING)),
                                         torch.cat([wide[0].spaces, wide[1].spaces])))

    def _scale(self, node: Node) -> bool:
        """A number for each vector, not for each channel."""
        operands = list(node.args[:2])
        carrying = [a for a in operands if isinstance(a, Node) and a in self._values]
        if len(carrying) != 1 or (carrying[0] is operands[1] and node.target is aten.div.Tensor):
            return False
        value = self._value(carrying[0])
        other = operands[1] if carrying[0] is operands[0] else operands[0]
        if isinstance(other, Node):
            if isinstance(other.meta.get("val"), Tensor):
                axis = self._axis(value) - value.numbers.ndim  # from the end, where shapes are aligned
                sizes = hinted(other)
                if len(sizes) >= -axis and sizes[axis] != 1:
                    return False
        shape = hinted(node)
        return self._keep(node, Vectors(value.numbers.expand(shape), value.spaces))

    def _matmul(self, node: Node) -> bool:
        left, right = node.args[:2]
        a = self._value(left) if isinstance(left, Node) and left in self._values else None
        b = self._value(right) if isinstance(right, Node) and right in self._values else None
        if a is not None and b is not None:
            return self._product(node, a, b)
        if b is None or b.numbers.ndim < 2:
            return False
        mixed = Vectors(b.numbers[..., :1, :], b.spaces)  # each row is a sum of rows
        if self._summed(b) is None:
            return False
        return self._keep(node, Vectors(mixed.numbers.expand(hinted(node)), b.spaces))

    def _summed(self, value: Vectors) -> Tensor | None:
        """The spaces along the last axis, shape (..., blocks), of rows that a matrix product sums: each block's become
        one.
        """
        lines = self._lines(value, -1)
        if lines is None or bool((lines == PADDING).any()):
            return None
        first = lines[..., :1, :].expand_as(lines)
        self._join_pairs(first, lines)
        return first[..., 0, :]

    def _product(self, node: Node, a: Vectors, b: Vectors) -> bool:
        """Vectors multiplied with vectors: the same rotation of both changes nothing."""
        if a.numbers.ndim < 2 or b.numbers.ndim < 2:
            return False
        left = self._summed(a)
        right = self._summed(Vectors(b.numbers.transpose(-2, -1), b.spaces))
        if left is None or right is None or left.shape[-1] != right.shape[-1]:
            return False
        left, right = torch.broadcast_tensors(left, right)
        self._join_pairs(left, right)
        for space in {self._find(s) for s in torch.unique(left).tolist()}:
            self._spaces[space].products.append(node)
        return True


class _Stop(Exception):
    """The operator does not keep vectors together, or it is not known whether it does."""


def _flat(value: Any) -> list[Vectors]:
    return list(value) if isinstance(value, tuple) else [value]


def _is_weight_of(user: Node, constant: Node) -> bool:
    """Whether a constant is a parameter of a layer, which the layer's own rule covers."""
    return any(user.args[i] is constant for i in PARAMETERS.get(user.target, ()) if i < len(user.args))


def _reason(node: Node, value: Node) -> str:
    if node.op == "output":
        return "it is an output of the model"
    return f"read by {describe_reader(Reader(node, value, torch.empty(0), False))}"


def head_sizes(graph_module: GraphModule) -> list[int]:
    """Channels of the values that attention averages, in every size that occurs."""
    sizes = {
        hinted(right)[-1]
        for node in graph_module.graph.nodes
        if node.target in MATMULS
        for left, right in [node.args[:2]]
        if isinstance(left, Node) and is_tensor(right) and softmax_behind(left) is not None
    }
    return sorted(sizes)
