"""The data file beside an ONNX file that is not trusted: judged by what the model says of it, opened once, and mapped.

It is one plain file in the model's own folder: no path, no link, no device. Stretches have their offset and length in
digits, lie within the file and do not overlap, so that nothing takes more memory than the file has bytes. What is
mapped is what was judged; no runtime opens a file by a name from the model.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from repquant_fx.errors import ModelFileError, first_line
from repquant_fx.security.escape import printable

_KEYS = ["length", "location", "offset"]
_LONGEST_NAME, _MOST_DIGITS = 255, 18
_FLAGS = (os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
          | getattr(os, "O_BINARY", 0))


@dataclass(frozen=True)
class Stretch:
    """The bytes of the tensor `name` in a file: `length` from `offset` on."""

    name: str
    location: str
    offset: int
    length: int


def stretch_of(tensor: TensorProto, what: str) -> Stretch:
    """Where a tensor says that its data is.

    Args:
        what: for the message.

    Raises:
        ModelFileError: it does not say so in full, says more, or names no file of the model's own folder.
    """
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    text = all(isinstance(part, str) for entry in entries for part in entry)  # protobuf gives bytes for what is none
    if tensor.data_location != TensorProto.EXTERNAL or not text or sorted(key for key, _ in entries) != _KEYS:
        raise ModelFileError(f"{what} keeps its data in another file, but does not say where: the file's name, an "
                             "offset and a length")
    said = dict(entries)
    for key in ("offset", "length"):
        if not (said[key].isascii() and said[key].isdigit() and len(said[key]) <= _MOST_DIGITS):
            raise ModelFileError(f"{what} keeps its data in another file at the {key} {printable(said[key], 40)}, "
                                 "which is no number of bytes")
    location = said["location"]
    if not _is_name(location):
        raise ModelFileError(f"{what} keeps its data in {printable(repr(location), 80)}, which is no name of a file "
                             "beside the model")
    return Stretch(tensor.name, location, int(said["offset"]), int(said["length"]))


def _is_name(location: str) -> bool:
    return (printable(location) == location and 0 < len(os.fsencode(location)) <= _LONGEST_NAME
            and location not in (".", "..") and not any(letter in location for letter in "/\\:"))


def map_data(model: Path, stretches: Sequence[Stretch]) -> dict[str, np.ndarray]:
    """The data file of a model, mapped into memory, read-only, by its name; nothing where no stretch lies in one.

    Raises:
        ModelFileError: there are several, or it is missing, no plain file, too short, larger than memory, or stretches
            overlap.
    """
    names = list(dict.fromkeys(stretch.location for stretch in stretches))
    if not names:
        return {}
    if len(names) > 1:
        raise ModelFileError(f"{model} keeps its data in {len(names)} files, {names[0]!r} and others; it may lie in "
                             "one")
    path = model.parent / names[0]
    if path == model:
        raise ModelFileError(f"{model} keeps its data in itself")
    end, before = 0, ""
    for stretch in sorted(stretches, key=lambda each: each.offset):
        if stretch.offset < end:
            raise ModelFileError(f"{model}: the tensors {before!r} and {stretch.name!r} overlap in {path.name}")
        end, before = stretch.offset + stretch.length, stretch.name
    from repquant_fx import limits  # which imports torch

    if (taken := sum(stretch.length for stretch in stretches)) > limits.memory():
        raise ModelFileError(f"{model}: its tensors in {path.name} take {limits.readable(taken)}, and this machine has "
                             f"{limits.readable(limits.memory())}")
    return {names[0]: _mapped(path, end, before)}


def _mapped(path: Path, end: int, last: str) -> np.ndarray:
    """The file, which must have `end` bytes at least: so many are taken up to the end of the tensor `last`."""
    try:
        handle = os.open(path, _FLAGS)
    except FileNotFoundError as error:
        raise ModelFileError(f"no such file: {path}, which the model beside it keeps its data in") from error
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror or error
        raise ModelFileError(f"cannot read {path}, which the model beside it keeps its data in: {reason}") from error
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or path.is_symlink():
            raise ModelFileError(f"cannot read {path}, which the model beside it keeps its data in: it is no plain "
                                 "file")
        if state.st_size < end:
            raise ModelFileError(f"{path} has {state.st_size} bytes, but the tensor {last!r} ends at {end}")
        with open(handle, "rb", closefd=False) as file:
            return np.memmap(file, np.uint8, "r", shape=(end,)) if end else np.empty(0, np.uint8)
    except (OSError, ValueError, OverflowError) as error:
        raise ModelFileError(f"cannot map {path} into memory: {first_line(error)}") from error
    finally:
        os.close(handle)
