"""The weights of a model directory: opened here, so that nothing else chooses what is read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.directory import ModelDirectory, open_regular
from repquant_fx.frontends.pickled import check_pickle


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
