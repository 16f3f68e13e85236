"""Install what a reconstruction learned: new values of constants, new quantizers in slots."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, attribute, replace_constant
from repquant_fx.passes.spec import OBSERVED, SITE


class InstallLearned(Pass):
    """Shapes and dtypes of constants stay as they are.

    Args:
        constants: by the node that reads one and the place of the argument: codes int8, all else float32.
        quantizers: by the slot's node.
    """

    name = "install learned"
    needs = "a quantizer at every slot, and constants, that what was learned speaks of"
    guarantees = "these slots hold the learned quantizers, these constants the learned values; the graph is the same"
    takes = gives = OBSERVED

    def __init__(
        self, constants: Mapping[tuple[Node, int], Tensor], quantizers: Mapping[Node, nn.Module]
    ) -> None:
        super().__init__()
        self.constants, self.quantizers = constants, quantizers

    def requires(self, graph_module: GraphModule) -> None:
        super().requires(graph_module)
        for node in self.quantizers:
            if node.op != "call_module" or SITE not in node.meta:
                raise PassError(f"{node.name} is no slot")
        for (node, index), value in self.constants.items():
            old = attribute(graph_module, node.args[index])  # type: ignore[arg-type]
            if (old.shape, old.dtype) != (value.shape, value.dtype):
                raise PassError(f"a constant of {node.name} is {tuple(old.shape)}, not {tuple(value.shape)}")

    def run(self, graph_module: GraphModule) -> bool:
        for (node, index), value in self.constants.items():
            old = node.args[index]
            assert isinstance(old, Node)
            replace_constant(graph_module, node, index, value, str(old.target))
        for node, quantizer in self.quantizers.items():
            graph_module.set_submodule(str(node.target), quantizer)
        return bool(self.constants or self.quantizers)
