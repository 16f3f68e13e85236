"""A factor and a shift per channel between an activation function and the Linears that read it.

Behind a LayerNorm a scale per channel costs nothing, because the norm's own gain takes it. GELU and its kin have no
gain. This pass gives them one: afterwards their channels are calibrated, clipped and reparameterized as those of a norm
are. It costs the file a multiplication and an addition of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.fx import GraphModule, Node

from repquant_fx.naming import beside
from repquant_fx.passes.base import Pass, aten, constant_node, copy_meta, is_constant, module_path, shape_of
from repquant_fx.passes.operators import AFFINE, ARITHMETIC, NONLINEAR
from repquant_fx.passes.spec import CANONICAL


class InsertAffine(Pass[None]):
    """`linear(f(x), W, b)` becomes `linear(affine(f(x), 1, 0), W, b)`: float32, `f` element-wise of shape (..., C), C
    fixed; factor and shift have shape (C,).

    Args:
        wanted: whether the Linear at a module path gets one; all where None.
    """

    name = "insert affine"
    needs = "the normal form, with a shape and a dtype at every activation function"
    guarantees = "the same outputs; an activation function that only such Linears read has a factor and a shift"
    takes = gives = CANONICAL
    identity = "float"

    def __init__(self, wanted: Callable[[str], bool] | None = None) -> None:
        super().__init__()
        self.wanted = wanted or (lambda _: True)

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            readers = [user for user in node.users if _reads(user, node)]
            if not any(self.wanted(module_path(reader)) for reader in readers) or not _is_activation(node):
                continue
            if len(readers) < len(node.users):
                self.leave(node, "something other than a Linear reads it as well")
            elif node.meta["val"].dtype is not torch.float32 or not isinstance(shape_of(node)[-1], int):
                self.leave(node, "its channels are not float32 and of a fixed number")
            else:
                _insert(graph_module, node, readers[0])
                modified = True
        return modified


def _is_activation(node: Node) -> bool:
    """Whether it is a function of one tensor, element by element, as one operator or written out, and not a linear one.
    """
    pending, seen, nonlinear = [node], {node}, False
    starts: set[Node] = set()
    while pending and len(starts) < 2:
        each = pending.pop()
        if each.op != "call_function" or each.target not in NONLINEAR | ARITHMETIC:
            starts.add(each)
            continue
        nonlinear = nonlinear or each.target in NONLINEAR
        before = [parent for parent in each.all_input_nodes if parent not in seen and not is_constant(parent)]
        pending.extend(before)
        seen.update(before)
    return nonlinear and len(starts) == 1 and shape_of(*starts) == shape_of(node)


def _reads(user: Node, node: Node) -> bool:
    return user.target is aten.linear.default and user.args[0] is node and is_constant(user.args[1])


def _insert(graph_module: GraphModule, node: Node, reader: Node) -> None:
    """The constants are named after the first Linear's weight, before which everything is put."""
    channels, name = int(shape_of(node)[-1]), str(cast(Node, reader.args[1]).target)
    weight = constant_node(graph_module, beside(name, "affine_factor"), torch.ones(channels), reader)
    bias = constant_node(graph_module, beside(name, "affine_shift"), torch.zeros(channels), reader)
    with graph_module.graph.inserting_before(reader):
        affine = graph_module.graph.call_function(AFFINE, (node, weight, bias))
    copy_meta(node, affine, node.meta["val"])
    node.replace_all_uses_with(affine, delete_user_cb=lambda user: user is not affine)
