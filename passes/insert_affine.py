"""A factor and a shift per channel between an activation function and the Linears that read it.

Behind a LayerNorm a scale per channel costs nothing, because the norm's own gain takes it. GELU and its kin have no
gain. This pass gives them one: afterwards their channels are calibrated, clipped and reparameterized as those of a norm
are. It costs the file a multiplication and an addition of the activation.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from repquant_fx.naming import beside
from repquant_fx.passes.base import Pass, aten, constant_node, copy_meta, is_constant, shape_of
from repquant_fx.passes.operators import ACTIVATIONS, AFFINE
from repquant_fx.passes.spec import CANONICAL


class InsertAffine(Pass[None]):
    """`linear(f(x), W, b)` becomes `linear(affine(f(x), 1, 0), W, b)`: float32, `f` element-wise of shape (..., C), C
    fixed; factor and shift have shape (C,).
    """

    name = "insert affine"
    needs = "the normal form, with a shape and a dtype at every activation function"
    guarantees = "the same outputs; every activation function that Linears alone read has a factor and a shift"
    takes = gives = CANONICAL
    identity = "float"

    def run(self, graph_module: GraphModule) -> bool:
        modified = False
        for node in [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in ACTIVATIONS]:
            readers = [user for user in node.users if _reads(user, node)]
            if not readers:
                continue  # it is no operand of a Linear
            if len(readers) < len(node.users):
                self.leave(node, "something other than a Linear reads it as well")
            elif node.meta["val"].dtype is not torch.float32 or not isinstance(shape_of(node)[-1], int):
                self.leave(node, "its channels are not float32 and of a fixed number")
            else:
                _insert(graph_module, node, readers[0])
                modified = True
        return modified


def _reads(user: Node, node: Node) -> bool:
    return user.target is aten.linear.default and user.args[0] is node and is_constant(user.args[1])


def _insert(graph_module: GraphModule, node: Node, reader: Node) -> None:
    """The constants are named after the first Linear's weight, before which everything is put."""
    channels, name = int(shape_of(node)[-1]), str(cast(Node, reader.args[1]).target)
    weight = constant_node(graph_module, beside(name, "input_factor"), torch.ones(channels), reader)
    bias = constant_node(graph_module, beside(name, "input_shift"), torch.zeros(channels), reader)
    with graph_module.graph.inserting_before(reader):
        affine = graph_module.graph.call_function(AFFINE, (node, weight, bias))
    copy_meta(node, affine, node.meta["val"])
    node.replace_all_uses_with(affine, delete_user_cb=lambda user: user is not affine)
