"""Matrices that lie apart from their model: ONNX's external data.

A file of protobuf ends at 2 GiB, and each copy of a model with its weights costs their memory. So a model in memory
keeps its matrices apart, as views of the tensors that they come from; ONNX Runtime reads them there. A file gets them
inside, or in one data file beside it (`OnnxModel.beside`):

    model.onnx                          says of each matrix: this file, from this byte on, so many
    model.onnx.3f0a5cc1d2e4b617.data    named after its content: a model never finds the data of another one

Offsets are multiples of a page, those of large matrices of what Windows maps, so that any runtime can map the file.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from repquant_fx.errors import InputError

SMALLEST = 1024  # bytes of a matrix that lies apart
LARGEST_FILE = (1 << 31) - 1  # bytes that protobuf takes
BESIDE_FROM = 1_500_000_000  # bytes of a file whose matrices go into a data file unasked
PAGE, GRANULE, LARGE = 1 << 12, 1 << 16, 1 << 20  # what is mapped on Linux, on Windows; a matrix that deserves it
_DIGITS, _LONGEST_STEM = 16, 200  # of the digest in the name of a data file; bytes of what stands before it


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model and the matrices that lie apart from it.

    Attributes:
        proto: of a tensor that lies apart it says which file holds it, from which byte on, and how many.
        files: what these files hold, uint8 of shape (bytes,), by their names.
    """

    proto: onnx.ModelProto
    files: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto | OnnxModel) -> OnnxModel:
        """The same; a proto alone holds all of its tensors."""
        return model if isinstance(model, OnnxModel) else cls(model)

    def owned(self) -> OnnxModel:
        """The same with copies of what lies apart: tensors that it was made of may change."""
        return OnnxModel(self.proto, {name: content.copy() for name, content in self.files.items()})

    def content(self, tensor: TensorProto) -> np.ndarray:
        """The bytes of a tensor that lies apart, uint8 of shape (bytes,), not copied."""
        place = place_of(tensor)
        start = int(place["offset"])
        return self.files[place["location"]][start : start + int(place["length"])]

    def view(self, tensor: TensorProto) -> np.ndarray:
        """The values of a tensor that lies apart, of at least 8 bits each, not copied where they are aligned."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.require(self.content(tensor).view(dtype).reshape(tuple(tensor.dims)), requirements=["C", "A"])

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of any tensor of the model."""
        return onnx.numpy_helper.to_array(self._whole(tensor) if is_apart(tensor) else tensor)

    def inlined(self) -> onnx.ModelProto:
        """A copy with all matrices inside; one of 2 GiB cannot be serialized."""
        proto = _copy(self.proto)
        for tensor in _apart(proto):
            tensor.CopyFrom(self._whole(tensor))
        return proto

    def to_bytes(self) -> bytes:
        """One file with all that belongs to it.

        Raises:
            InputError: it would pass 2 GiB.
        """
        if (size := self.size()) > LARGEST_FILE:
            raise InputError(f"the model takes {size} bytes, and one ONNX file less than 2 GiB: save it with external "
                             "data, as save() does by itself")
        return self.inlined().SerializeToString(deterministic=True)

    def size(self) -> int:
        """Bytes of the one file, without making it."""
        graph = self.proto.graph
        inside = graph.ByteSize()
        for tensor in _apart(self.proto):
            whole = _without_data(tensor).ByteSize() + _field(int(place_of(tensor)["length"]))
            inside += _field(whole) - _field(tensor.ByteSize())
        return self.proto.ByteSize() - _field(graph.ByteSize()) + _field(inside)

    def declared(self) -> onnx.ModelProto:
        """A copy in which what lies apart are inputs: for what would look for the files."""
        proto = _copy(self.proto)
        kept = [tensor for tensor in proto.graph.initializer if not is_apart(tensor)]
        proto.graph.input.extend(onnx.helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
                                 for each in _apart(proto))
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        return proto

    def beside(self, name: str) -> tuple[bytes, dict[str, Parts]]:
        """The bytes of a file with its matrices in a data file beside it.

        Args:
            name: of the file.

        Returns:
            its bytes, and the data file's parts by its name: none where there are no matrices.
        """
        proto, placed = _copy(self.proto), list(self._placed())
        if not placed:
            return proto.SerializeToString(deterministic=True), {}
        parts = Parts(placed)
        location = f"{_stem(name)}.{parts.digest()[:_DIGITS]}.data"
        for tensor, (start, content) in zip(_apart(proto), placed, strict=True):
            _place(tensor, location, start, len(content))
        return proto.SerializeToString(deterministic=True), {location: parts}

    def _placed(self) -> Iterator[tuple[int, np.ndarray]]:
        end = 0
        for tensor in _apart(self.proto):
            content = self.content(tensor)
            step = GRANULE if len(content) >= LARGE else PAGE
            start = -(-end // step) * step
            end = start + len(content)
            yield start, content

    def _whole(self, tensor: TensorProto) -> TensorProto:
        whole = _without_data(tensor)
        whole.raw_data = self.content(tensor).tobytes()
        return whole


class Parts:
    """What a data file holds, one part after the other, so that it is never held as a whole."""

    def __init__(self, placed: list[tuple[int, np.ndarray]]) -> None:
        self._placed = placed

    def __iter__(self) -> Iterator[Any]:
        end = 0
        for start, content in self._placed:
            yield bytes(start - end)
            yield content
            end = start + len(content)

    def __len__(self) -> int:
        """Bytes of all parts."""
        start, content = self._placed[-1]
        return start + len(content)

    def digest(self) -> str:
        """Of the content, in hexadecimal digits."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(part)
        return digest.hexdigest()


def keep_apart(model: ir.Model) -> dict[str, np.ndarray]:
    """Let a model refer to its matrices instead of holding them; returns the files that it refers to from then on.

    Only constants of two axes or more lie apart: scales, shapes and what else is read to understand a model stay in.
    """
    files: dict[str, np.ndarray] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or len(tensor.shape) < 2 or tensor.nbytes < SMALLEST:
            continue
        location = str(len(files))
        files[location] = _raw(tensor)
        value.const_value = ir.ExternalTensor(location, 0, len(files[location]), tensor.dtype, shape=tensor.shape,
                                              name=str(value.name), doc_string=tensor.doc_string)
    return files


def is_apart(tensor: TensorProto) -> bool:
    """Whether the data of a tensor is elsewhere, or said to be."""
    return bool(tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data))


def place_of(tensor: TensorProto) -> dict[str, str]:
    """What a tensor says of the place of its data."""
    return {entry.key: entry.value for entry in tensor.external_data}


def is_large(tensor: TensorProto) -> bool:
    """Whether a tensor lies apart and passes 2 GiB by itself, in whole bytes an element."""
    return (is_apart(tensor) and int(place_of(tensor)["length"]) > LARGEST_FILE
            and ir.DataType(tensor.data_type).bitwidth >= 8)


def is_data_of(name: str, model: str) -> bool:
    """Whether a file's name is one that `OnnxModel.beside` gives to the data of a model of this name."""
    return re.fullmatch(rf"{re.escape(_stem(model))}\.[0-9a-f]{{{_DIGITS}}}\.data", name) is not None


def _stem(name: str) -> str:
    """What a data file is called after: the model's name, as far as a model can spell it and a name has room."""
    spelled = "".join(letter if letter.isprintable() and letter not in "/\\:" else "_" for letter in name)
    return spelled.encode()[:_LONGEST_STEM].decode(errors="ignore")


def _raw(tensor: ir.TensorProtocol) -> np.ndarray:
    """The bytes as a file holds them, a view where memory holds them so."""
    if tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _apart(proto: onnx.ModelProto) -> list[TensorProto]:
    return [tensor for tensor in proto.graph.initializer if is_apart(tensor)]


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _without_data(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("external_data")
    copy.ClearField("data_location")
    return copy


def _place(tensor: TensorProto, location: str, start: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", start), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _field(length: int) -> int:
    """Bytes of a protobuf field of so many: its key (one byte for all fields in question), its length, its content."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length
