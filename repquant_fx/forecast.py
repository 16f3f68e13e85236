"""How large the file of a compile will be, told before its work; and a disk that has no room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx import log
from repquant_fx.errors import OutputError
from repquant_fx.exporters.apart import BESIDE_FROM
from repquant_fx.exporters.packing import PACKED_BITS
from repquant_fx.limits import readable
from repquant_fx.passes.base import attribute, is_constant
from repquant_fx.passes.match_sites import Plan

# bytes of the file: names and the record; scales, zero points and bias of a weight's row; of a group of its inputs
PER_NODE, PER_CHANNEL, PER_GROUP = 600, 17, 5


def predicted_bytes(graph_module: GraphModule, plan: Plan, group_size: int = 0) -> int:
    """About how large the file will be: codes of the weights that the plan quantizes, all other constants as they are,
    and what describes them. No more than a tenth off where weights make up the file.

    Args:
        group_size: of the recipe: inputs that share a scale where activations stay in float.
    """
    total, weights = float(PER_NODE * len(graph_module.graph.nodes)), set()
    for group in plan.groups:
        for consumer in group.consumers:
            weight = consumer.args[1] if len(consumer.args) > 1 else None
            if not isinstance(weight, Node) or not is_constant(weight):
                continue
            tensor = attribute(graph_module, weight)
            settings = group.plans[consumer]
            bits = PACKED_BITS if settings.wbits <= PACKED_BITS else 8
            grouped = settings.weight_only and group_size and tensor.ndim == 2
            scales = PER_GROUP * -(-tensor.shape[1] // group_size) if grouped else PER_CHANNEL
            total += tensor.numel() * bits / 8 + scales * len(tensor)
            weights.add((weight, consumer))
    floats: dict[str, Tensor] = {
        str(node.target): attribute(graph_module, node) for node in graph_module.graph.find_nodes(op="get_attr")
        if any((node, user) not in weights for user in node.users)  # of a tied table, too
    }
    return round(total + sum(tensor.nbytes for tensor in floats.values()))


def check_room(path: Path, size: int) -> None:
    """
    Raises:
        OutputError: the disk that `path` will be on has less free than `size` bytes.
    """
    folder = next(each for each in path.absolute().parents if each.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(f"cannot write {path}: the file takes about {readable(size)}, and the disk of {folder} has "
                          f"{readable(free)} free")


def announce(size: int, external_data: bool = False, out: Path | None = None) -> None:
    """Say how large a file will be, and refuse a disk that has no room for it.

    Raises:
        OutputError: see `check_room`.
    """
    apart = "; its matrices go into a data file beside it" if external_data or size >= BESIDE_FROM else ""
    log.detail(f"the file takes about {readable(size)}{apart}")
    if out is not None:
        check_room(out, size)

