"""A decision about one group of layers: all that the rewriting of the graph needs besides the graph.

It is made once, sent to the other processes and kept in the work directory as named tensors, and installed by one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Node

from repquant_fx.passes.match_sites import Group
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer
from repquant_fx.quantizers.weight import ChosenWeight
from repquant_fx.recipe_settings import FLOAT


@dataclass(frozen=True)
class Decision:
    """What becomes of a group; or of its activations alone, before its weights were chosen, or of its weights alone.

    Attributes:
        quantizers: of the group's activations as calibrated (before any reparameterization), by site name.
        weights: by consumer.
    """

    quantizers: Mapping[str, nn.Module] = field(default_factory=dict)
    weights: Mapping[Node, ChosenWeight] = field(default_factory=dict)

    def to_tensors(self, group: Group) -> dict[str, Tensor]:
        """As tensors, numbered by the place of a site or consumer in the group."""
        tensors: dict[str, Tensor] = {}
        for index, site in enumerate(group.sites):
            if site.name in self.quantizers:
                tensors |= {
                    f"site.{index}.{key}": t for key, t in _quantizer_to_tensors(self.quantizers[site.name]).items()
                }
        for index, consumer in enumerate(group.consumers):
            if consumer in self.weights:
                tensors |= {f"weight.{index}.{key}": t for key, t in _weight_to_tensors(self.weights[consumer]).items()}
        return tensors

    @classmethod
    def from_tensors(cls, group: Group, tensors: Mapping[str, Tensor]) -> Decision:
        """The inverse; on the tensors' device.

        Raises:
            KeyError, ValueError: the tensors are of another group.
        """
        quantizers = {
            site.name: _quantizer_from_tensors(_under(f"site.{index}.", tensors))
            for index, site in enumerate(group.sites)
            if site.bits != FLOAT
        }
        parts = [(consumer, _under(f"weight.{index}.", tensors)) for index, consumer in enumerate(group.consumers)]
        return cls(quantizers, {consumer: _weight_from_tensors(consumer, part) for consumer, part in parts if part})

    def is_complete(self, group: Group) -> bool:
        """Whether it says what becomes of every activation and weight of the group."""
        weighted = group.consumers if group.kind != "matmul" else ()
        return all(site.name in self.quantizers for site in group.sites if site.bits != FLOAT) and all(
            consumer in self.weights for consumer in weighted
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _quantizer_to_tensors(quantizer: nn.Module) -> dict[str, Tensor]:
    if isinstance(quantizer, LogQuantizer):
        parts = [float(quantizer.scale), quantizer.bits, quantizer.steps, quantizer.normalized]
        return {"log": torch.tensor(parts, dtype=torch.float64)}
    assert isinstance(quantizer, UniformQuantizer)
    scale, zero_point = quantizer.exact
    return {"scale": scale, "zero_point": zero_point, "bits": torch.tensor(quantizer.bits)}


def _quantizer_from_tensors(tensors: Mapping[str, Tensor]) -> nn.Module:
    if "log" in tensors:
        scale, bits, steps, normalized = tensors["log"].tolist()
        return LogQuantizer(scale, int(bits), int(steps), normalized=bool(normalized))
    return UniformQuantizer(tensors["scale"], tensors["zero_point"], int(tensors["bits"]))


def _weight_to_tensors(chosen: ChosenWeight) -> dict[str, Tensor]:
    tensors = {"codes": chosen.weight.codes, "scale": chosen.weight.scale}
    if chosen.weight.zero_point is not None:
        tensors["zero_point"] = chosen.weight.zero_point
    if chosen.weight.group:
        tensors["group"] = torch.tensor(chosen.weight.group)
    if chosen.bias is not None:
        tensors["bias"] = chosen.bias
    if chosen.errors is not None:
        tensors["errors"] = torch.tensor(chosen.errors, dtype=torch.float64)
    return tensors


def _weight_from_tensors(consumer: Node, tensors: Mapping[str, Tensor]) -> ChosenWeight:
    group = int(tensors["group"]) if "group" in tensors else 0
    weight = QuantizedWeight(tensors["codes"], tensors["scale"], tensors.get("zero_point"), group)
    node = consumer.args[1]
    if not isinstance(node, Node) or weight.codes.shape != node.meta["val"].shape or weight.codes.dtype != torch.int8:
        raise ValueError(f"codes {tuple(weight.codes.shape)} of {consumer.name}")
    errors = tensors.get("errors")
    return ChosenWeight(weight, tensors.get("bias"), None if errors is None else (float(errors[0]), float(errors[1])))
