"""A block of the graph with everything in it that can be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx.offload import Values
from repquant_fx.passes.base import attribute, is_constant
from repquant_fx.passes.install_learned import InstallLearned
from repquant_fx.passes.operators import DEQUANTIZE
from repquant_fx.passes.spec import SITE
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.straight_through import LearnedLog, LearnedUniform, LearnedWeight

# How far a parameter may go in all, were every step in one direction: weights and zero points in codes, scales in
# powers of e, vectors relative to their root mean square. Fewer steps than SLOWEST do not take larger ones.
SLOWEST = 400
TRAVEL = {"codes": 4.0, "zero_point": 1.0, "growth": 0.2}
VECTOR_TRAVEL = 0.2


class LearnedBlock(nn.Module):
    """Consecutive nodes of a graph with quantizers in its slots, run with gradients.

    Learned are weights (before rounding) and their scales, per-tensor scales and zero points of activations, and
    vectors: biases, gains of norms, any float constant with one axis longer than 1 that this block alone reads. The
    first values are those of the graph, bit for bit.

    Attributes:
        stand_ins: a `LearnedWeight` for the node that dequantizes one, a quantizer for a slot.
        vectors: by the node that reads the constant (`get_attr`).
    """

    def __init__(self, graph_module: GraphModule, nodes: Sequence[Node], latents: Mapping[Node, Tensor]) -> None:
        """
        Args:
            latents: weights before they were rounded, in the shape of their codes, by the node that dequantizes them.
        """
        super().__init__()
        self._run = partial(run_nodes, graph_module, nodes)  # no attribute: its parameters are not this module's
        self.stand_ins = {
            node: each for node in nodes if (each := _stand_in(graph_module, node, latents.get(node))) is not None
        }
        self.vectors = {node: nn.Parameter(attribute(graph_module, node).detach().clone())
                        for node in _vectors(graph_module, nodes)}
        # what nn.Module must know of them; the dictionaries above are keyed by node
        self.numbered = nn.ModuleList(self.stand_ins.values())
        self.numbered_vectors = nn.ParameterList(self.vectors.values())

    def forward(self, values: Values, wanted: Sequence[Node]) -> list[Any]:
        """The values of `wanted`, from those that the block reads."""

        def instead(node: Node, env: Values) -> Any:
            each = self.stand_ins[node]
            return each() if isinstance(each, LearnedWeight) else each(env[node.args[0]])  # type: ignore[index]

        env = self._run({**values, **self.vectors}, dict.fromkeys(self.stand_ins, instead))
        return [env[node] for node in wanted]

    def parameter_groups(self, steps: int) -> Iterator[dict[str, Any]]:
        """For an optimizer whose learning rate falls from these to zero along half a cosine in so many steps."""
        rate = 2 / max(steps, SLOWEST)
        for name, travel in TRAVEL.items():
            parameters = [p for each in self.numbered for key, p in each.named_parameters() if key == name]
            if parameters:
                yield {"params": parameters, "lr": rate * travel}
        for vector in self.vectors.values():
            size = float(vector.detach().square().mean().sqrt().clamp(min=1e-3))
            yield {"params": [vector], "lr": rate * VECTOR_TRAVEL * size}

    def install(self) -> InstallLearned:
        """The pass that writes what was learned into the graph."""
        constants: dict[tuple[Node, int], Tensor] = {}
        quantizers: dict[Node, nn.Module] = {}
        for node, each in self.stand_ins.items():
            if isinstance(each, LearnedWeight):
                weight = each.learned()
                constants[node, 0], constants[node, 1] = weight.codes, weight.scale
            elif isinstance(each, LearnedUniform):
                quantizers[node] = each.learned()
        for node, vector in self.vectors.items():
            for reader in node.users:
                for index, argument in enumerate(reader.args):
                    if argument is node:
                        constants[reader, index] = vector.detach()
        return InstallLearned(constants, quantizers)


def run_nodes(
    graph_module: GraphModule, nodes: Sequence[Node], values: Values,
    instead: Mapping[Node, Callable[[Node, Values], Any]] | None = None,
) -> Values:
    """Run nodes in order on the values they need, with gradients where those have some; gives all values.

    Args:
        instead: what computes a node's value in its place, from the node and the values so far.
    """
    interpreter = Interpreter(graph_module, garbage_collect_values=False)
    env = interpreter.env = dict(values)
    for node in nodes:
        for parent in node.all_input_nodes:
            if parent not in env:  # a constant
                value = interpreter.run_node(parent)
                env[parent] = value.detach() if isinstance(value, Tensor) else value
        own = None if instead is None else instead.get(node)
        env[node] = interpreter.run_node(node) if own is None else own(node, env)
    return env


def _stand_in(graph_module: GraphModule, node: Node, latent: Tensor | None) -> nn.Module | None:
    if node.target is DEQUANTIZE and is_constant(node.args[0]):
        codes, scale = (attribute(graph_module, argument) for argument in node.args[:2])  # type: ignore[arg-type]
        return LearnedWeight(QuantizedWeight(codes, scale), latent, cast(int, node.args[3]))
    if SITE in node.meta:
        quantizer = graph_module.get_submodule(str(node.target))
        if isinstance(quantizer, LogQuantizer):
            return LearnedLog(quantizer)
        if isinstance(quantizer, UniformQuantizer) and quantizer.axis is None:
            return LearnedUniform(quantizer)
    return None


def _vectors(graph_module: GraphModule, nodes: Sequence[Node]) -> Iterator[Node]:
    """Constants with one axis longer than 1, finite floats, that these nodes alone read, and each through one node."""
    inside = set(nodes)
    readers: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + 1
    for node in dict.fromkeys(parent for each in nodes if each.target is not DEQUANTIZE
                              for parent in each.all_input_nodes if parent.op == "get_attr"):
        value = attribute(graph_module, node)
        if (value.is_floating_point() and 1 < value.numel() == max(value.shape) and set(node.users) <= inside
                and readers[str(node.target)] == 1 and bool(torch.isfinite(value).all())):
            yield node
