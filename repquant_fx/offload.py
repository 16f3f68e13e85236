"""The values that cross a cut, for every batch: in memory, or in a file while other batches are at work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.fx import Node

from repquant_fx.errors import OutputError

Values = dict[Node, Any]


class Cuts(Sequence[Values]):
    """One set of values per batch, kept in memory."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._values = list(values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def replace(self, function: Callable[[Values], Values]) -> None:
        """Replace each batch's values by `function` of them."""
        for index in range(len(self)):
            self._values[index] = function(self[index])


@dataclass(frozen=True)
class _View:
    """A tensor as a part of a storage (the bytes from `start` on in the file), with its own strides."""

    storage: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OffloadedCuts(Cuts):
    """One set of values per batch, in a temporary file without a name: nothing is left of it, however the process ends.

    Whole storages are written and read back, so that a tensor returns with its strides and the same kernels run on it.
    What the caller holds anyway (the batches given) stays in memory.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, values: Sequence[Values], folder: str | Path) -> None:
        super().__init__(values)
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._records: list[tuple[Values, list[tuple[int, int]]]] = []

    def __getitem__(self, index: Any) -> Any:
        if self._file is None:
            return super().__getitem__(index)
        values, places = self._records[index]
        storages = [self._read(start, size) for start, size in places]
        return {node: _restore(v, storages) if isinstance(v, _View) else v for node, v in values.items()}

    def replace(self, function: Callable[[Values], Values]) -> None:
        records = []
        try:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)
            for index in range(len(self)):
                records.append(_write(file, function(self[index])))
            file.flush()
        except OSError as error:
            raise OutputError(f"cannot keep values in {self._folder}: {error.strerror or error}") from error
        if self._file is not None:
            self._file.close()
        self._file, self._records = file, records

    def _read(self, start: int, size: int) -> torch.UntypedStorage:
        assert self._file is not None
        data = torch.empty(size, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(data.numpy()) != size:  # type: ignore[attr-defined]
            raise OutputError(f"the file of offloaded values in {self._folder} came back shorter than it was written")
        return data.untyped_storage()


def cuts_of(values: Sequence[Values], folder: str | Path | None) -> Cuts:
    """Kept in memory, or in a file in `folder`."""
    return Cuts(values) if folder is None else OffloadedCuts(values, folder)


def on_disk(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a view of a file."""
    return any(tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None for tensor in tensors)


def _write(file: IO[bytes], values: Values) -> tuple[Values, list[tuple[int, int]]]:
    """Append every storage once; gives the values with views for tensors, and where each storage lies."""
    written: Values = {}
    places: list[tuple[int, int]] = []
    index_of: dict[int, int] = {}
    for node, value in values.items():
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            written[node] = value
            continue
        storage = value.untyped_storage()
        if storage.data_ptr() not in index_of:
            index_of[storage.data_ptr()] = len(places)
            places.append((file.tell(), storage.nbytes()))
            file.write(memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy()))  # type: ignore[arg-type]
        written[node] = _View(
            index_of[storage.data_ptr()], int(value.storage_offset()), value.dtype, tuple(value.shape), value.stride()
        )
    return written, places


def _restore(view: _View, storages: list[torch.UntypedStorage]) -> Tensor:
    return torch.empty(0, dtype=view.dtype).set_(storages[view.storage], view.offset, view.shape, view.strides)
