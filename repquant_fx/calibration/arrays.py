"""Files of arrays: .npy, .npz, .pt and .safetensors. No code of a file is executed.

Of a .npz an array is unpacked when it is asked for, once its header and its entry in the archive agree on its size.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repquant_fx import limits
from repquant_fx.calibration.inputs import Array
from repquant_fx.errors import CalibrationError, first_line
from repquant_fx.frontends.pickled import check_pickle

_SHARE = 4  # of memory: the part of it that the arrays of an archive may take
ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")


def read_arrays(path: Path) -> Array | tuple[Array, ...] | Mapping[str, Array]:
    """The arrays of a .npy (memory-mapped), .npz (each read when it is asked for), .pt or .safetensors file.

    Raises:
        CalibrationError: unknown suffix, damaged file, objects that are no arrays.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise CalibrationError(
            f"calibration data {path}: unknown suffix {suffix or '(none)'!r}; an image folder, or one of "
            f"{', '.join(ARRAY_SUFFIXES)} is needed"
        )
    try:
        if suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an archive of arrays; call it .npz")
            return np.asarray(array)
        if (declared := limits.unpacks_to(path)) is not None:
            raise CalibrationError(
                f"calibration data {path} has {path.stat().st_size} bytes but would unpack to {declared}"
            )
        if suffix == ".npz":
            return _Archive(path)
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        data = path.read_bytes()
        check_pickle(data, str(path))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CalibrationError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return tuple(loaded) if isinstance(loaded, list) else loaded


class _Archive(Mapping[str, np.ndarray]):
    """The arrays of a .npz, by name."""

    def __init__(self, path: Path) -> None:
        self.path, self.taken = path, 0
        with zipfile.ZipFile(path) as archive:
            self.entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if not all(entry.filename.endswith(".npy") for entry in self.entries.values()):
            raise ValueError("it holds other files than arrays")

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if self.taken + entry.file_size > limits.memory() // _SHARE:
            raise CalibrationError(
                f"calibration data {self.path} would unpack to {limits.readable(self.taken + entry.file_size)}, more "
                f"than a quarter of the {limits.readable(limits.memory())} of this machine; give .npy, which stay on "
                "disk"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open(entry) as file:
                    _check_header(file, name, entry.file_size)
                with archive.open(entry) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise _unreadable(self.path, error) from error
        self.taken += entry.file_size
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _check_header(file: Any, name: str, stored: int) -> None:
    """Refuse an array that does not fill its entry of the archive: memory is taken by its header.

    Raises:
        ValueError: it does not, or it is none.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"{name} is of the version {version} of the format")
    shape, _, dtype = readers[version](file)
    if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != stored:
        raise ValueError(f"{name} claims {math.prod(shape) * dtype.itemsize} bytes where {stored - file.tell()} are")


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"calibration data {path} cannot be read as plain arrays (pickled objects are refused): {first_line(error)}"
    )
