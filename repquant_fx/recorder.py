"""Run a graph and see the values of some of its nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from repquant_fx.errors import CalibrationError, first_line

OUTSIDE = re.compile(r"out of (bounds|range)")


@contextmanager
def naming(node: Node) -> Iterator[None]:
    """An index that the data leads beyond a tensor is the data's fault, and says where.

    Raises:
        CalibrationError: in place of torch's error.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if not OUTSIDE.search(str(error)):
            raise
        raise CalibrationError(f"{node.name} does not run on this data: "
                               f"{first_line(error)}; give samples like the example inputs") from error


def shaken(value: Any, share: float, generator: torch.Generator) -> Any:
    """A float tensor with every element moved up or down by a share of it, as rounding does; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
    return value * (1 + share * signs.to(value))


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
        with naming(n):
            value = super().run_node(n)
        if n not in self.wanted:
            return value
        if self.visit is not None:
            return self.visit(n, value)
        self.kept[n] = value
        return value
