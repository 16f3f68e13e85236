"""Small exported programs, and changes to what their archives declare and hold."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attacks import archive_of, records_of
from torch import Tensor, nn

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Calls(nn.Module):
    """A function as a module; its tensors are buffers `t0`, `t1`, ..."""

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.count = function, len(tensors)
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"t{index}", tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, f"t{index}") for index in range(self.count)))


def saved(module: nn.Module, *inputs: Tensor, dynamic: bool = False) -> bytes:
    """The bytes of a `.pt2`."""
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    return as_bytes(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes))


def as_bytes(exported: torch.export.ExportedProgram) -> bytes:
    """The bytes of the `.pt2` of a program."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def program(function: Callable[..., Any], *tensors: Tensor, x: Tensor | None = None) -> bytes:
    """A program that applies `function` to an input, 2 rows of 4 unless given, and to stored tensors."""
    return saved(Calls(function, tensors), torch.ones(2, 4) if x is None else x)


def edited(data: bytes, change: Callable[[Any], None], record: str = MODEL) -> bytes:
    """The archive with one of its JSON documents changed."""
    records = records_of(data)
    document = json.loads(records[record])
    change(document)
    return archive_of({**records, record: json.dumps(document).encode()})


def with_values(data: bytes, index: int, values: Tensor) -> bytes:
    """The archive with other values in the buffer `t<index>`; as many bytes as before."""
    records = records_of(data)
    config = json.loads(records[WEIGHTS])["config"][f"t{index}"]
    path = f"data/weights/{config['path_name']}"
    content = values.contiguous().numpy().tobytes()
    assert len(content) == len(records[path])
    return archive_of({**records, path: content})


def with_shape(
    data: bytes, index: int, sizes: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0
) -> bytes:
    """The archive with another shape declared for the buffer `t<index>`, in the weights and in the graph."""
    strides = torch.empty(tuple(sizes), device="meta").stride() if strides is None else strides

    def declare(meta: dict[str, Any]) -> None:
        meta["sizes"], meta["strides"] = ([{"as_int": int(value)} for value in values] for values in (sizes, strides))
        meta["storage_offset"] = {"as_int": offset}

    data = edited(data, lambda document: declare(document["config"][f"t{index}"]["tensor_meta"]), WEIGHTS)
    return edited(data, lambda document: declare(document["graph_module"]["graph"]["tensor_values"][f"b_t{index}"]))


def nodes(document: Any) -> list[Any]:
    """The nodes of a program's document."""
    found: list[Any] = document["graph_module"]["graph"]["nodes"]
    return found


def argument(node: Any, name: str) -> Any:
    """The argument of a node, to be changed."""
    return next(given["arg"] for given in node["inputs"] if given["name"] == name)
