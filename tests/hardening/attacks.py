"""Hostile bytes: pickles written by hand, archives that lie, and damage at random places."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from repquant_fx.calibration.arrays import read_arrays

COMMAND = "cos\nsystem\n(S'touch RAN'\ntR"  # a pickle that runs a command in the current directory


def torch_file(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def torch_zip(pickled: bytes, records: Mapping[str, bytes] | None = None) -> bytes:
    """A torch.save archive around a pickle written by hand."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in {"data.pkl": pickled, "byteorder": b"little", **(records or {})}.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def records_of(archive: bytes) -> dict[str, bytes]:
    """The records of an archive of torch."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    return {name: bytes(reader.get_record(name)) for name in reader.get_all_records() if not name.startswith(".data")}


def archive_of(records: Mapping[str, bytes]) -> bytes:
    """The reverse of `records_of`."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def doubling(levels: int = 60) -> bytes:
    """Opcodes for a tuple of 2**levels leaves, each level twice the one below."""
    code = b"K\x01q\x00"
    for level in range(levels):
        code += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return code


def as_key(value: bytes) -> bytes:
    """A pickle of a dict with this value for a key, which hashes it."""
    return b"\x80\x02}" + value + b"K\x01s."


def deep(levels: int = 1_000_000) -> bytes:
    """Opcodes for a tuple of one element, so often that hashing it overflows the stack of C."""
    return b"N" + b"\x85" * levels


def npy(shape: tuple[int, ...], dtype: str = "<f4", body: bytes = b"\0" * 1000) -> bytes:
    """A .npy whose header says what it likes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def zipped(members: Mapping[str, bytes]) -> bytes:
    """A zip archive, stored."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb(name: str, mebibytes: int = 32) -> bytes:
    """A small zip archive with one member of zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        zeros = bytes(1 << 24)
        for _ in range(mebibytes // 16 + 1):
            file.write(zeros)
    return buffer.getvalue()


def safetensors_header(header: bytes, length: int | None = None) -> bytes:
    """A safetensors file that is nothing but its header, with any length claimed for it."""
    return struct.pack("<Q", len(header) if length is None else length) + header


@st.composite
def damages(draw: st.DrawFn) -> Any:
    """A function that damages bytes: cut short, cut out, or some bytes changed, at places drawn in shares of the
    length.
    """
    share = st.floats(0, 1, exclude_max=True)
    kind = draw(st.sampled_from(["truncate", "cut", "change"]))
    start, length = draw(share), draw(st.integers(1, 64))
    changes = draw(st.lists(st.tuples(share, st.integers(0, 255)), min_size=1, max_size=24))

    def damage(data: bytes) -> bytes:
        at = int(start * len(data))
        if kind == "truncate":
            return data[:at]
        if kind == "cut":
            return data[:at] + data[at + length:]
        changed = bytearray(data)
        for place, value in changes if data else ():
            changed[int(place * len(data))] = value
        return bytes(changed)

    return damage


def arrays(path: Path) -> Any:
    """All that a file of arrays holds; an .npz gives them one by one."""
    found = read_arrays(path)
    return dict(found) if isinstance(found, Mapping) else found
