"""Run a graph and see the values of some of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.fx import Interpreter, Node


class Recorder(Interpreter):
    """Keeps the values of wanted nodes, or gives each to `visit` as soon as it is computed.

    Attributes:
        kept: values by node, of the last run; empty where there is a `visit`.
    """

    def __init__(
        self, graph_module: nn.Module, wanted: Iterable[Node], visit: Callable[[Node, Any], Any] | None = None
    ) -> None:
        """`visit` gets a node and its value, and gives the value to go on with."""
        super().__init__(graph_module)
        self.extra_traceback = False  # what is wrong with the data is said in one line
        self.wanted, self.visit = frozenset(wanted), visit
        self.kept: dict[Node, Any] = {}

    def run(self, *args: Any, **options: Any) -> Any:
        self.kept = {}
        return super().run(*args, **options)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n not in self.wanted:
            return value
        if self.visit is not None:
            return self.visit(n, value)
        self.kept[n] = value
        return value
