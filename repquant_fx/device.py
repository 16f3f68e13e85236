"""Where calibration computes: the CPU, or a GPU where there is one. Loading, lowering and export stay on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from repquant_fx.errors import InputError
from repquant_fx.torch_private import pytree


def usable(name: str | torch.device) -> torch.device:
    """The device of that name, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: no such device here.
    """
    try:
        probe = torch.zeros(1, dtype=torch.float64, device=name)  # second moments need float64
        probe.sum().item()
    except Exception as error:  # torch raises several kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot compute on device {str(name)!r}: {reason}; use --device cpu, or a build of torch for it"
        ) from error
    return probe.device


def move(graph_module: GraphModule, device: torch.device) -> None:
    """Move a graph's constants, and make the operators that create tensors create them there. Who shares the constants
    keeps them.
    """
    if all(tensor.device == device for tensor in [*graph_module.parameters(), *graph_module.buffers()]):
        return
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        graph_module.to(device)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, node.args), pytree.tree_map(moved, node.kwargs)
    graph_module.recompile()


def move_batches(batches: Sequence[tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """Calibration batches on a device; the same tensors where they are there already."""
    return [tuple(tensor.to(device) for tensor in batch) for batch in batches]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the block no operator runs in another precision than its operands': codes must not depend on who
    called.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
