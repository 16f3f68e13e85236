"""Keep token matrices flat between Linears.

A Linear runs on a matrix, so lowering flattens its input and gives its output the leading axes back. What stands
between two Linears mostly works on each row alone (norms over the last axis, activation functions, residual additions,
quantizers) and does so just as well on the flat matrix. Here the restoring reshape moves down past such operators until
it meets the next flattening and both vanish.
"""

from __future__ import annotations

from typing import Any, cast

from torch import SymInt
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, aten, copy_meta, is_constant, is_tensor, shape_of
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import AFFINE, ELEMENT_WISE, NORMS
from repquant_fx.passes.spec import RUNTIME


class FlattenRows(Pass):
    """Values of shape (..., C) become matrices of shape (rows, C) between two Linears; their dtypes stay."""

    name = "flatten rows"
    needs = "a graph lowered to Q/DQ, with tensor metadata"
    guarantees = (
        "row-wise operators between flattened Linears work on the matrix; every value is the same up to its leading "
        "axes"
    )
    takes = gives = RUNTIME

    def run(self, graph_module: GraphModule) -> bool:
        modified = _read_sizes_from_inputs(graph_module)
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function":
                modified |= self._merge(node) if node.target is aten.reshape.default else self._sink(node)
        if graph_module.graph.eliminate_dead_code() or modified:
            refresh_metadata(graph_module)
            modified = True
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.reshape.default):
            if _flat(node) is not None:
                for user in node.users:
                    self._say(user)
        return modified

    def _say(self, user: Node) -> None:
        """Why what reads a restored matrix does not work on the matrix."""
        if _row_wise(user):
            self.leave(user, "it works on the rows of a matrix, but with another operand of another shape")

    def _merge(self, node: Node) -> bool:
        """A reshape of a restored matrix reads the matrix; one to the matrix's own shape is the matrix."""
        source = cast(Node, node.args[0])
        flat = _flat(source)
        if flat is None:
            return False
        if len(shape_of(node)) == 2 and _same(shape_of(node)[1], shape_of(flat)[1]):
            node.replace_all_uses_with(flat)
            node.graph.erase_node(node)
        else:
            node.update_arg(0, flat)
        return True

    def _sink(self, node: Node) -> bool:
        """op(restore(x), ...) becomes restore(op(x, ...))."""
        tensors = [a for a in node.args if is_tensor(a) and not (is_constant(a) and len(shape_of(cast(Node, a))) <= 1)]
        restored = [cast(Node, a) for a in tensors if _flat(cast(Node, a)) is not None]
        if not restored or not _row_wise(node) or not is_tensor(node):
            return False
        shape = shape_of(node)
        if any(not _equal(shape_of(cast(Node, t)), shape) for t in tensors):
            return False
        graph, first = node.graph, restored[0]
        # all of them have its shape; types are brought up to date at the end
        matrix = cast(Node, _flat(first)).meta["val"]

        def flatten(argument: Any) -> Any:
            if argument not in tensors:
                return argument
            flat = _flat(argument)
            if flat is None:
                with graph.inserting_before(node):
                    flat = copy_meta(
                        node, graph.call_function(aten.reshape.default, (argument, [-1, shape[-1]])), matrix
                    )
            return flat

        args = tuple(flatten(a) for a in node.args)
        with graph.inserting_before(node):
            moved = copy_meta(node, graph.call_function(cast(Any, node.target), args, node.kwargs), matrix)
            result = copy_meta(
                node, graph.call_function(aten.reshape.default, (moved, first.args[1])), node.meta["val"]
            )
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return True


def _flat(node: Node) -> Node | None:
    """The matrix behind a reshape that only gave it leading axes back."""
    if node.op != "call_function" or node.target is not aten.reshape.default:
        return None
    source = cast(Node, node.args[0])
    before, after = shape_of(source), shape_of(node)
    return source if len(before) == 2 and len(after) > 2 and _same(before[1], after[-1]) else None


def _row_wise(node: Node) -> bool:
    if node.target is AFFINE:
        return True
    if node.target in NORMS:
        return len(cast(Any, node.args[1])) == 1
    return node.target in ELEMENT_WISE and not any(isinstance(v, Node) for v in node.kwargs.values())


def _read_sizes_from_inputs(graph_module: GraphModule) -> bool:
    """Sizes that an input has are read from that input, so that no value between is kept for its shape; whether any
    were not.
    """
    sources: dict[Any, tuple[Node, int]] = {}
    last = None
    for node in graph_module.graph.find_nodes(op="placeholder"):
        last = node
        if is_tensor(node):
            for axis, size in enumerate(shape_of(node)):
                if isinstance(size, SymInt):
                    sources.setdefault(size.node.expr, (node, axis))
    made: dict[Any, Node] = {}
    modified = False
    for node in list(graph_module.graph.find_nodes(op="call_function", target=aten.sym_size.int)):
        size = node.meta.get("val")
        expression = size.node.expr if isinstance(size, SymInt) else None
        if expression not in sources or last is None:
            continue
        if expression not in made and (node.args, node.prev) == (sources[expression], last):
            made[expression] = last = node  # it stands there already
        if expression not in made:
            modified = True
            with graph_module.graph.inserting_after(last):
                made[expression] = graph_module.graph.call_function(aten.sym_size.int, sources[expression])
            made[expression].meta["val"] = size
        if node is not made[expression]:
            modified = True
            node.replace_all_uses_with(made[expression])
            graph_module.graph.erase_node(node)
    return modified


def _equal(a: list[int | SymInt], b: list[int | SymInt]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are known to be equal, whatever the symbols' values."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)
