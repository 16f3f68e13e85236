"""What calibrating one group decides, as plain tensors: all that the rewriting of the graph needs besides the graph.

Fresh decisions take the same way into the graph as those read from a file or received from another process, so that the three
give the same result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from repquant_fx.distributed import Tensors
from repquant_fx.passes.match_sites import Group
from repquant_fx.passes.quantize_weights import ChosenWeight
from repquant_fx.quantizers.gptq import QuantizedWeight
from repquant_fx.quantizers.observers import LogQuantizer, UniformQuantizer


def quantizers_to_tensors(group: Group, quantizers: Mapping[str, nn.Module]) -> Tensors:
    """The quantizers of a group's sites, as calibrated (before any reparameterization)."""
    tensors: Tensors = {}
    for index, site in enumerate(group.sites):
        quantizer = quantizers[site.name]
        if isinstance(quantizer, LogQuantizer):
            tensors[f"site.{index}.log"] = torch.tensor([float(quantizer.scale), quantizer.bits, quantizer.steps], dtype=torch.float64)
        else:
            assert isinstance(quantizer, UniformQuantizer)
            scale, zero_point = quantizer.exact
            tensors |= {f"site.{index}.scale": scale, f"site.{index}.zero_point": zero_point, f"site.{index}.bits": torch.tensor(quantizer.bits)}
    return tensors


def quantizers_from_tensors(group: Group, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The inverse, by site name.

    Raises:
        KeyError: the tensors are of another group.
    """
    quantizers: dict[str, nn.Module] = {}
    for index, site in enumerate(group.sites):
        if f"site.{index}.log" in tensors:
            scale, bits, steps = tensors[f"site.{index}.log"].tolist()
            quantizers[site.name] = LogQuantizer(scale, int(bits), int(steps))
        else:
            quantizers[site.name] = UniformQuantizer(tensors[f"site.{index}.scale"], tensors[f"site.{index}.zero_point"],
                                                     int(tensors[f"site.{index}.bits"]))
    return quantizers


def weights_to_tensors(group: Group, chosen: Mapping[Node, ChosenWeight]) -> Tensors:
    """The integer weights and new biases of a group's consumers."""
    tensors: Tensors = {}
    for index, consumer in enumerate(group.consumers):
        if consumer in chosen:
            choice = chosen[consumer]
            tensors |= {f"weight.{index}.codes": choice.weight.codes, f"weight.{index}.scale": choice.weight.scale}
            if choice.bias is not None:
                tensors[f"weight.{index}.bias"] = choice.bias
            if choice.errors is not None:
                tensors[f"weight.{index}.errors"] = torch.tensor(choice.errors, dtype=torch.float64)
    return tensors


def weights_from_tensors(group: Group, tensors: Mapping[str, Tensor]) -> dict[Node, ChosenWeight]:
    """The inverse, by consumer.

    Raises:
        KeyError, ValueError: the tensors are of another group.
    """
    chosen: dict[Node, ChosenWeight] = {}
    for index, consumer in enumerate(group.consumers if group.kind != "matmul" else ()):
        weight = QuantizedWeight(tensors[f"weight.{index}.codes"], tensors[f"weight.{index}.scale"])
        node = consumer.args[1]
        if not isinstance(node, Node) or weight.codes.shape != node.meta["val"].shape or weight.codes.dtype != torch.int8:
            raise ValueError(f"codes {tuple(weight.codes.shape)} of {consumer.name}")
        errors = tensors.get(f"weight.{index}.errors")
        chosen[consumer] = ChosenWeight(weight, tensors.get(f"weight.{index}.bias"), None if errors is None else (float(errors[0]), float(errors[1])))
    return chosen
