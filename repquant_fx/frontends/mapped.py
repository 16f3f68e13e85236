"""Weights that stay on disk: a model whose parameters are views of its safetensors files, read when a layer is at work.

The operating system reads such pages when they are needed and drops them when memory is short, so a model may be larger
than memory; its integer codes, which replace the weights layer by layer, take a quarter or less. Weights in another
type than float32 are converted, one at a time, into a file without a name.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx.errors import OutputError
from repquant_fx.security import channel
from repquant_fx.torch_private import parameters_on_meta

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def map_directory(
    cls: Any, config: Any, files: Sequence[Path], scratch: Path, attention: str = "sdpa"
) -> nn.Module | None:
    """A transformers model on the weights in files, or None where names or shapes do not fit one to one.

    Args:
        cls: its class.
        files: of safetensors.
        scratch: a folder for weights that must be converted.
        attention: implementation, as transformers names it.

    Raises:
        OutputError: `scratch` cannot be written.
    """
    with parameters_on_meta():
        model = cls._from_config(config, dtype=torch.float32, attn_implementation=attention)
    places = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found = {name: tensor for file in files for name, tensor in map_file(file).items()}
    if any(name not in places or places[name].shape != tensor.shape for name, tensor in found.items()):
        return None
    for name, tensor in to_float32(found, scratch).items():
        _put(model, name, tensor)
    model.tie_weights()
    return model.eval() if not any(p.is_meta for p in [*model.parameters(), *model.buffers()]) else None


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of it. Writing to one changes memory, never the file.

    Raises:
        safetensors.SafetensorError: damaged.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt"):
        pass  # lengths, offsets and types are consistent
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, (start, stop) = _TYPES.get(entry["dtype"]), entry["data_offsets"]
        if kind is None:
            raise ValueError(f"{path}: {name} is {entry['dtype']}")
        begin = 8 + length + start
        if begin % kind.itemsize:  # not aligned: a copy
            tensors[name] = torch.frombuffer(bytearray(bytes(storage[begin : 8 + length + stop])), dtype=kind).reshape(
                entry["shape"]
            )
        else:
            tensors[name] = _view(storage, kind, begin // kind.itemsize, entry["shape"])
    return tensors


def to_float32(tensors: dict[str, Tensor], scratch: Path) -> dict[str, Tensor]:
    """The same with floats of other types converted, in a mapped file of their own."""
    others = {
        name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    if not others:
        return tensors
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=scratch, prefix=".weights.", delete=False) as file:
            channel.tell("temporary", path=os.path.abspath(file.name))
            try:
                for tensor in others.values():
                    file.write(tensor.float().numpy().tobytes())
                file.flush()
                storage = torch.UntypedStorage.from_file(file.name, False, file.tell())
            finally:
                with suppress(OSError):  # Windows keeps files that are in use
                    Path(file.name).unlink()
    except OSError as error:
        raise OutputError(f"cannot write weights to {scratch}: {error.strerror or error}") from error
    converted, offset = {}, 0
    for name, tensor in others.items():
        converted[name] = _view(storage, torch.float32, offset, list(tensor.shape))
        offset += tensor.numel()
    return {**tensors, **converted}


def _view(storage: Any, kind: torch.dtype, offset: int, shape: list[int]) -> Tensor:
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    return torch.empty(0, dtype=kind).set_(storage, offset, shape, strides)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
