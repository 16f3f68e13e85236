"""The weights of a model directory: opened here, so that nothing else chooses what is read."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.directory import ModelDirectory, open_regular
from repquant_fx.frontends.pickled import check_pickle

_SPARE = 1 << 24  # elements that a model may have beyond its files: new heads, tables, tied weights under two names


def open_weights(files: ModelDirectory, names: Sequence[str], stack: ExitStack) -> dict[str, Any]:
    """Tensors by name; those of safetensors are slices, read when they are taken, while `stack` is open.

    Raises:
        ModelFileError: a pickle that holds anything but tensors and plain data.
        Exception: whatever a damaged file makes its library raise.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for name in names:
        path = files.files[name]
        if name.endswith(".safetensors"):
            opened = stack.enter_context(safe_open(str(path), framework="pt"))
            found |= {key: opened.get_slice(key) for key in opened.keys()}
            continue
        with open_regular(path) as file:
            data = file.read()
        check_pickle(data, str(files.path / name))
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(held, Mapping) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items()
        ):
            raise ModelFileError(f"{files.path / name} holds other things than tensors by name")
        found |= held
    return found


def check_amount(skeleton: nn.Module | None, tensors: Mapping[Any, Any], what: str) -> None:
    """Refuse a description that asks for far more memory than there are weights, before the memory is taken.

    Args:
        skeleton: the model on the meta device, if it can be built so.
        tensors: of `open_weights`.
        what: for the message.

    Raises:
        InputError: the model has more than twice the elements of the files.
    """
    if skeleton is None:
        return
    wanted = sum({id(tensor): tensor.numel() for tensor in [*skeleton.parameters(), *skeleton.buffers()]}.values())
    given = sum(math.prod(_shape(tensor)) for tensor in tensors.values())
    if wanted > 2 * given + _SPARE:
        raise InputError(
            f"{what} of {wanted:,} weights, but its files hold {given:,}: they belong to another model, or weights "
            "are missing"
        )


def _shape(tensor: Any) -> Sequence[int]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor.get_shape())
