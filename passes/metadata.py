"""Recompute what the metadata of a graph says of its values: shapes and dtypes, as fake tensors.

Passes edit a few nodes of many, and most of them are followed by a refresh. So a node is computed again only where its
operator, its arguments or one of its inputs is another than at the last time.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from repquant_fx.errors import PassError
from repquant_fx.torch_private import by_python_rules, fake_mode, propagating

# torch's own rules for these make numbers of symbolic sizes, or fail on them
_NOT_BY_SYMBOLS = (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default,
                   torch.ops.aten.addcmul.default, torch.ops.aten.addcdiv.default)
COMPUTED = "repquant_fx.computed"  # key of a node's meta: what its value was computed from, and the value


def refresh_metadata(graph_module: GraphModule) -> None:
    """Bring `meta['val']` of every node up to date with the placeholders' (fake) values, keeping symbolic shapes.

    Raises:
        PassError: the placeholders have no fake values.
    """
    inputs = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
    modes = [mode for value in inputs if (mode := fake_mode(value)) is not None]
    if not modes:
        raise PassError("the graph's inputs carry no fake tensors; capture it with repquant_fx.frontends.capture")
    mode = modes[0]
    # an operator that compares a symbolic size must not make it a constant here: the export has settled what is dynamic
    with propagating(mode):
        _Propagation(graph_module, mode=mode).propagate_dont_convert_inputs(*inputs)


class _Propagation(FakeTensorProp):
    """Computes what has changed."""

    def run_node(self, node: Node) -> Any:
        if node.op in ("placeholder", "output"):
            return Interpreter.run_node(self, node)  # a placeholder's value is where all others come from
        if node.op == "get_attr":
            sources: tuple[Any, ...] = (Interpreter.run_node(self, node),)
        else:
            sources = tuple(self.env[each] for each in node.all_input_nodes)
        before = node.meta.get(COMPUTED)
        if before is not None and before.holds(node, sources):
            return before.result
        with by_python_rules() if node.target in _NOT_BY_SYMBOLS else nullcontext():
            result = super().run_node(node)
        node.meta[COMPUTED] = _Computed(node, sources, result)
        return result


class _Computed:
    """What a node's value was computed from, without keeping a replaced weight in memory."""

    def __init__(self, node: Node, sources: tuple[Any, ...], result: Any) -> None:
        self._call, self._value = _call(node), node.meta.get("val")
        self._sources = tuple(_kept(source) for source in sources)
        self._result = _kept(result)

    @property
    def result(self) -> Any:
        """What the nodes that read it get."""
        return self._result() if isinstance(self._result, weakref.ref) else self._result

    def holds(self, node: Node, sources: tuple[Any, ...]) -> bool:
        """Whether the node would give the same again, and nobody has set its value since."""
        return (
            self._value is node.meta.get("val")
            and len(sources) == len(self._sources)
            and all(a is (b() if isinstance(b, weakref.ref) else b) for a, b in zip(sources, self._sources))
            and self._call == _call(node)
        )


def _kept(value: Any) -> Any:
    """A fake tensor or a size as it is; a real one by a weak reference."""
    return weakref.ref(value) if isinstance(value, Tensor) and fake_mode(value) is None else value


def _call(node: Node) -> tuple[Any, ...]:
    """A node's operator and arguments, its inputs by their places among them."""
    places = {each: f"%{index}" for index, each in enumerate(node.all_input_nodes)}
    return node.op, node.target, repr(torch.fx.map_arg((node.args, node.kwargs), lambda each: places[each]))
