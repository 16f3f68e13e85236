"""Reading an ONNX file that is not trusted: screened before anything follows its names, and what was screened is run.

Refused are tensors of another size than they claim, those in other files but for matrices in one data file beside the
model (see `exporters.data_file`), names with control characters, circles, functions that call themselves or expand to
more than a runtime can take, and files that are all structure. ONNX Runtime checks operators and types itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.apart import OnnxModel, is_apart
from repquant_fx.exporters.data_file import Stretch, map_data, stretch_of
from repquant_fx.exporters.metadata import Metadata
from repquant_fx.files import irregular
from repquant_fx.security.escape import printable

_MOST_BYTES = (1 << 31) - 1  # of a file of protobuf
_MOST_FIELDS = 4_000_000  # strings and messages outside of tensors; a vision transformer has some thousands
# What calls expand to, and its bytes. Our functions have 20 nodes each, one for each Softmax; ONNX Runtime takes 10 s
# for 16,000 nodes and eight times as long for four times as many.
_MOST_NODES, _MOST_COPIED = 20_000, 1 << 28
_DEEPEST_CALLS = 32
_LONGEST_NAME = 10_000
_NUMBERS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")  # beside raw data
_DATA = (*_NUMBERS, "string_data", "raw_data")
# Of each kind of message the fields, by number, that are messages with many fields in them.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"}, "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 11: "value", 12: "value", 13: "value"}, "function": {7: "node", 11: "attribute", 12: "value"},
    "node": {5: "attribute"}, "attribute": {6: "graph", 11: "graph", 14: "type", 15: "type"},
    "value": {2: "type"}, "type": {1: "tensor type", 4: "element", 5: "map", 8: "tensor type", 9: "element"},
    "element": {1: "type"}, "map": {2: "type"},
    "tensor type": {2: "shape"}, "shape": {1: "dimension"}}


@dataclass(frozen=True)
class OnnxFile:
    """A screened file.

    Attributes:
        model: its content.
        data: its bytes, for ONNX Runtime: a path could name another file by then.
        metadata: what it says of itself.
        files: the data file beside it, mapped into memory, by its name; none where all is in the file.
    """

    model: onnx.ModelProto
    data: bytes
    metadata: Metadata
    files: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def apart(self) -> OnnxModel:
        """The model with what lies apart from it."""
        return OnnxModel(self.model, self.files)

    @property
    def bytes(self) -> int:
        """Of the file and of the data file."""
        return len(self.data) + sum(map(len, self.files.values()))


def read_onnx(path: str | Path) -> OnnxFile:
    """Read and screen a file.

    Raises:
        ModelFileError: missing, not ONNX, or refused; the message names what was found and where.
    """
    source = str(path)
    if kind := irregular(Path(path)):
        raise ModelFileError(f"{source} is {kind}, not a file")
    try:
        size = Path(path).stat().st_size
        if size > _MOST_BYTES:
            raise ModelFileError(f"{source} has {size} bytes; an ONNX file has less than 2 GiB")
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(f"no such file: {source}") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    model, apart = _parse(data, source)
    return OnnxFile(model, data, Metadata.of(model, source), map_data(Path(path), apart))


def parse_onnx(data: bytes, source: str) -> onnx.ModelProto:
    """Bytes of a file as a screened model, which holds all of its tensors.

    Raises:
        ModelFileError: see `read_onnx`.
    """
    model, apart = _parse(data, source)
    if apart:
        raise ModelFileError(f"{source}: the tensor {apart[0].name!r} keeps its data in another file, which lies "
                             "beside a file that is read by its path")
    return model


def _parse(data: bytes, source: str) -> tuple[onnx.ModelProto, list[Stretch]]:
    """A screened model, and what it reads of a data file.

    Raises:
        ModelFileError: see `read_onnx`.
    """
    check_fields(data, source)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:
        raise ModelFileError(f"{source} is not an ONNX model: {str(error) or type(error).__name__}") from error
    if not model.ir_version or not model.HasField("graph"):
        raise ModelFileError(f"{source} is not an ONNX model: it holds no graph")
    screen = _Screen(source)
    screen.model(model)
    return model, screen.apart


def check_fields(data: bytes, source: str) -> None:
    """Refuse a file of so many small messages that reading it takes many times its size. Counting them keeps nothing.

    Raises:
        ModelFileError: more than any model has.
    """
    count, open_messages = 0, [(0, len(data), "model")]
    while open_messages:
        at, end, kind = open_messages.pop()
        inside = _INSIDE.get(kind, {})
        while at < end:
            key, at = _varint(data, at)
            wire = key & 7
            if wire == 2:
                length, at = _varint(data, at)
                count += 1
                if (child := inside.get(key >> 3)) is not None:
                    open_messages.append((at, min(at + length, end), child))
                at += length
            elif wire == 0:
                _, at = _varint(data, at)
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            else:  # groups, which ONNX has not; or no protobuf at all, which its parser says
                break
            if count > _MOST_FIELDS:
                raise ModelFileError(f"{source} holds more than {_MOST_FIELDS} names and messages, which no model has")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf and where it ends; past the end of the data it is zero."""
    value = shift = 0
    for index in range(at, min(at + 10, len(data))):
        byte = data[index]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, index + 1
        shift += 7
    return 0, len(data)


def check_tensor(tensor: TensorProto, where: str) -> None:
    """Refuse a tensor that is not what it says, or not in this file.

    Args:
        where: for the message.

    Raises:
        ModelFileError: its data is in another file, of an unknown type, or more or less than its shape takes.
    """
    name = f"{where}: the tensor {tensor.name!r}"
    if is_apart(tensor):
        raise ModelFileError(f"{name} keeps its data in another file; only matrices that are initializers of the model "
                             "may")
    dtype = _type_of(tensor, name)
    wanted = prod(tensor.dims)
    if dtype == ir.DataType.STRING:
        stored = len(tensor.string_data)
    elif tensor.raw_data:
        wanted, stored = (wanted * dtype.bitwidth + 7) // 8, len(tensor.raw_data)
    else:
        stored = sum(len(getattr(tensor, each)) for each in _NUMBERS)
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            wanted *= 2
        elif dtype.bitwidth < 8:  # several in one entry
            wanted = -(-wanted // (8 // dtype.bitwidth))
    if stored != wanted:
        shape = str(list(tensor.dims))[:80]
        raise ModelFileError(f"{name} of shape {shape} holds {stored} values or bytes, not {wanted}")


def _type_of(tensor: TensorProto, name: str) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelFileError(f"{name} has the unknown type {tensor.data_type}") from error
    if dtype == ir.DataType.UNDEFINED or any(side < 0 for side in tensor.dims):
        raise ModelFileError(f"{name} has no type, or a negative size")
    return dtype


def _stretch(tensor: TensorProto, source: str) -> Stretch:
    """Where a matrix lies in a data file.

    Raises:
        ModelFileError: it does not say so, holds data all the same, or its shape takes another number of bytes.
    """
    name = f"{source}: the tensor {tensor.name!r}"
    dtype = _type_of(tensor, name)
    inside = any(len(getattr(tensor, each)) for each in _DATA)
    if dtype == ir.DataType.STRING or len(tensor.dims) < 2 or inside:
        raise ModelFileError(f"{name} keeps its data in another file and is no matrix of numbers, or has data of its "
                             "own: only matrices may lie apart")
    stretch = stretch_of(tensor, name)
    wanted = (prod(tensor.dims) * dtype.bitwidth + 7) // 8
    if stretch.length != wanted:
        raise ModelFileError(f"{name} of shape {str(list(tensor.dims))[:80]} takes {stretch.length} bytes of another "
                             f"file, not {wanted}")
    return stretch


class _Screen:
    """One walk over a model; `apart`: what it reads of a data file."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.functions: dict[tuple[str, str], list[onnx.FunctionProto]] = {}
        self.sizes: dict[tuple[str, str], tuple[int, int, int]] = {}
        self.apart: list[Stretch] = []

    def model(self, model: onnx.ModelProto) -> None:
        for function in model.functions:
            self._names([function.name, function.domain, *function.input, *function.output], "function")
            self.functions.setdefault(_operator(function.domain, function.name), []).append(function)
            self._attributes(function.attribute_proto, f"function {function.name!r}", [])
            self._nodes(function.node, [set(function.input)])
        self._graph(model.graph, [], outermost=True)
        nodes, copied, _ = self._expanded(_all_nodes(model.graph.node), ())
        if nodes > _MOST_NODES or copied > _MOST_COPIED:
            raise ModelFileError(f"{self.source}: its functions expand to {nodes} nodes and copy {copied} bytes, more "
                                 "than any model has")

    def _graph(self, graph: onnx.GraphProto, outer: list[set[str]], outermost: bool = False) -> None:
        values = [value.name for values in (graph.input, graph.output, graph.value_info) for value in values]
        self._names([graph.name, *values, *(tensor.name for tensor in graph.initializer)], "value")
        for tensor in graph.initializer:
            if outermost and is_apart(tensor):
                self.apart.append(_stretch(tensor, self.source))
            else:
                check_tensor(tensor, self.source)
        self._sparse(graph.sparse_initializer)
        defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        self._nodes(graph.node, [*outer, defined | {sparse.values.name for sparse in graph.sparse_initializer}])

    def _nodes(self, nodes: Sequence[onnx.NodeProto], scopes: list[set[str]]) -> None:
        """`known`: names that the nodes may read, the innermost scope last; theirs are added to it in order."""
        later = {name for node in nodes for name in node.output}
        for node in nodes:
            self._names([node.name, node.op_type, node.domain, *node.input, *node.output], "node")
            for name in node.input:
                if name in later and not any(name in scope for scope in scopes):
                    raise ModelFileError(f"{self.source}: the node {node.name or node.op_type!r} reads {name!r}, which "
                                         "depends on it or comes later")
            self._attributes(node.attribute, f"node {node.name or node.op_type!r}", scopes)
            scopes[-1].update(node.output)

    def _attributes(self, attributes: Iterable[onnx.AttributeProto], where: str, scopes: list[set[str]]) -> None:
        for attribute in attributes:
            for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
                check_tensor(tensor, f"{self.source}: {where}")
            self._sparse(attribute.sparse_tensors)
            if attribute.HasField("sparse_tensor"):
                self._sparse([attribute.sparse_tensor])
            for graph in _subgraphs(attribute):
                self._graph(graph, scopes)

    def _sparse(self, tensors: Iterable[onnx.SparseTensorProto]) -> None:
        for sparse in tensors:
            check_tensor(sparse.values, self.source)
            check_tensor(sparse.indices, self.source)

    def _names(self, names: Iterable[object], what: str) -> None:
        for name in names:
            if isinstance(name, str) and len(name) <= _LONGEST_NAME and printable(name) == name:
                continue
            shown = printable(name if isinstance(name, str) else repr(name), 80)  # bytes where they are not UTF-8
            raise ModelFileError(f"{self.source}: a {what} has the name {shown}, which is no printable text of at most "
                                 f"{_LONGEST_NAME} characters")

    def _expanded(self, nodes: Iterable[onnx.NodeProto], callers: tuple[tuple[str, str], ...]) -> tuple[int, int, int]:
        """How many nodes calls become when each is replaced by what it calls, how many bytes that copies, and how many
        levels of calls there are."""
        total = copied = levels = 0
        for node in nodes:
            called = _operator(node.domain, node.op_type)
            if called not in self.functions:
                total, copied = total + bool(callers), copied + (node.ByteSize() if callers else 0)
                continue
            if called in callers:
                raise ModelFileError(f"{self.source}: the function {called[1]!r} calls itself")
            if called not in self.sizes and len(callers) < _DEEPEST_CALLS:
                chain = (*callers, called)
                inside = [self._expanded(_all_nodes(function.node), chain) for function in self.functions[called]]
                most, bytes_, deepest = (max(each) for each in zip(*inside))
                self.sizes[called] = most, bytes_, deepest
            if called not in self.sizes or (deep := 1 + self.sizes[called][2]) > _DEEPEST_CALLS:
                raise ModelFileError(
                    f"{self.source}: functions call each other more than {_DEEPEST_CALLS} levels deep, at {called[1]!r}"
                )
            total, copied = total + self.sizes[called][0], copied + self.sizes[called][1]
            levels = max(levels, deep)
        return total, copied, levels


def _operator(domain: str, name: str) -> tuple[str, str]:
    return "" if domain == "ai.onnx" else domain, name


def _subgraphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs]


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _subgraphs(attribute):
                yield from _all_nodes(graph.node)
