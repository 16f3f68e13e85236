"""Files of arrays: .npy, .npz, .pt and .safetensors. No code of a file is executed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from repquant_fx import limits
from repquant_fx.calibration.inputs import Array
from repquant_fx.errors import CalibrationError, first_line
from repquant_fx.frontends.pickled import check_pickle

ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")


def read_arrays(path: Path) -> Array | tuple[Array, ...] | dict[str, Array]:
    """The arrays of a .npy (memory-mapped), .npz, .pt or .safetensors file. No code of the file is executed.

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
            _check_archive(path)
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds other files than arrays")  # numpy gives their bytes
            return arrays
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        data = path.read_bytes()
        check_pickle(data, str(path))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"calibration data {path} cannot be read as plain arrays "
                               f"(pickled objects are refused): {first_line(error)}") from error
    return tuple(loaded) if isinstance(loaded, list) else loaded



def _check_archive(path: Path) -> None:
    """The arrays of an archive are all read: together they must fit."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > limits.memory() // 4:
        raise CalibrationError(
            f"calibration data {path} would unpack to {limits.readable(declared)}, more than a quarter "
            f"of the {limits.readable(limits.memory())} of this machine; give .npy, which stay on disk"
        )
