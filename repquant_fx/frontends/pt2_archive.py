"""The archive of a `.pt2`: its records, JSON documents and tensors, read once.

Weights and constants are bytes with a description beside them. The example inputs are a pickle of torch's: it is looked
through (`pickled.check_pickle`), read by torch's weights-only reader, and may hold plain tensors only.

Nothing is trusted for what it declares. What is returned is all that is loaded: nothing goes back to the bytes. Tensors
are views inside their payload.
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.pickled import check_pickle, first_line
from repquant_fx.security.names import check_names
from repquant_fx.torch_private import archive_reader, dtype_codes

MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_PAYLOADS = {_WEIGHTS: re.compile(r"weight_\d{1,9}", re.ASCII), _CONSTANTS: re.compile(r"tensor_\d{1,9}", re.ASCII)}
_RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d{1,9}|model_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,9}|model_constants_config\.json)|archive_format|archive_version|byteorder|version"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment|extra/[\w.\-/]+",
    re.ASCII,
)
_TEXTS = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}

_MOST_RECORDS, _MOST_JSON = 100_000, 128 << 20
_SMALL = 1 << 20  # elements of a tensor that may repeat itself
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_STRIDED, _LARGEST = 7, 2**63 - 1


@dataclass(frozen=True)
class Archive:
    """What a `.pt2` holds.

    Attributes:
        program: the document of the program, not yet screened.
        weights: parameters and buffers by name; parameters are `nn.Parameter`.
        constants: other tensors by name.
        samples: (args, kwargs) that were stored with the program; None without.
    """

    program: dict[str, Any]
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]
    samples: tuple[Any, Any] | None


def read_archive(data: bytes, where: str) -> Archive:
    """Read an archive of torch.export.

    Raises:
        ModelFileError: damaged, of another version, with a record that a program need not have, or with tensors that
            are not raw, lie outside their payload or are larger than it.
    """
    try:
        reader = archive_reader(data)
        records = reader.get_all_records()
    except Exception as error:
        raise ModelFileError(f"not a model file: {where} is truncated or damaged ({first_line(error)})") from error
    _check_records(reader, records, where)
    program = _document(reader, MODEL, where)
    if not isinstance(program, dict):
        raise ModelFileError(f"not a model file: {MODEL} in {where} is malformed")
    tensors = [_tensors(reader, config, where) if config in records else {} for config in (_WEIGHTS, _CONSTANTS)]
    total = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
    if total > limits.memory():
        raise InputError(
            f"{where} is too large: its tensors take {limits.readable(total)}, "
            f"and this machine has {limits.readable(limits.memory())}"
        )
    return Archive(program, tensors[0], tensors[1], _samples(reader, records, where))


def refuse(where: str, record: str, reason: str) -> NoReturn:
    """Raise the ModelFileError for what a program need not hold."""
    raise ModelFileError(
        f"{where} is refused before loading, because it could execute code or reach memory that is not its own: "
        f"{record} {reason}. Pass --allow-pickle if you trust the file"
    )


def _check_records(reader: Any, records: list[str], where: str) -> None:
    if len(records) > _MOST_RECORDS:
        refuse(where, "the archive", f"has {len(records)} records, more than any model has")
    for record in records:
        if not _RECORDS.fullmatch(record):
            refuse(where, ascii(record[:80]), "is a record that a program need not have")
    if len({record.lower() for record in records}) != len(records):
        refuse(where, "the archive", "has two records of one name")  # look-ups ignore case
    if MODEL not in records:
        raise ModelFileError(f"not a model file: {where} is an archive of torch.export without {MODEL}")
    for record, wanted in _TEXTS.items():
        found = reader.get_record(record) if record in records and reader.get_record_size(record) < 80 else None
        if found != wanted and (found is not None or record != "byteorder"):
            raise ModelFileError(
                f"{where} cannot be loaded by torch {torch.__version__}: its {record} is not {wanted.decode()!r}. "
                "Save it again with this torch"
            )


def _document(reader: Any, record: str, where: str) -> Any:
    """A JSON document as torch writes it: each key once, no NaN, integers of 64 bits."""
    try:
        if reader.get_record_size(record) > _MOST_JSON:
            raise ValueError(f"it is longer than {_MOST_JSON >> 20} MiB")
        return json.loads(
            reader.get_record(record).decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_small_int,
            parse_float=_finite,
        )
    except (ValueError, RuntimeError, RecursionError) as error:
        raise ModelFileError(f"not a model file: {record} in {where} is damaged ({first_line(error)})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {repeated[:60]!a} is there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _small_int(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > _LARGEST:
        raise ValueError(f"the number {text[:20]} takes more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _tensors(reader: Any, record: str, where: str) -> dict[str, Tensor]:
    """Weights or constants by name: raw tensors, no pickles, custom objects or opaque objects."""
    config = _document(reader, record, where)
    declared = config.get("config") if isinstance(config, dict) else None
    if not isinstance(declared, dict):
        raise ModelFileError(f"not a model file: {record} in {where} is malformed")
    check_names(declared, where)
    payloads: dict[tuple[str, torch.dtype], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, meta in declared.items():
        path = meta.get("path_name") if isinstance(meta, dict) else None
        if not isinstance(path, str) or not _PAYLOADS[record].fullmatch(path):
            refuse(where, record, f"stores {name[:60]!a} as {ascii(path)[:60]}, which is not a tensor")
        if meta.get("use_pickle") is not False:
            refuse(where, record, f"stores {name[:60]!a} as a pickle")
        tensor = _view(
            reader, f"{record.rpartition('/')[0]}/{path}", meta.get("tensor_meta"), payloads, f"{where}: {name}"
        )
        wants = bool(meta["tensor_meta"].get("requires_grad")) and tensor.is_floating_point()
        tensors[name] = torch.nn.Parameter(tensor, requires_grad=wants) if meta.get("is_param") is True else tensor
    return tensors


def _view(reader: Any, record: str, meta: Any, payloads: dict[tuple[str, torch.dtype], Tensor], what: str) -> Tensor:
    """The tensor that a record holds as its declaration says, if it lies inside."""
    meta = meta if isinstance(meta, dict) else {}
    sizes, strides = (_numbers(meta.get(key)) for key in ("sizes", "strides"))
    offset = _numbers([meta.get("storage_offset")])
    dtype = dtype_codes().get(meta.get("dtype"))
    if sizes is None or strides is None or offset is None or len(sizes) != len(strides) or len(sizes) > 32:
        raise ModelFileError(f"{what} is declared with sizes or strides that no tensor has")
    if dtype not in _DTYPES or meta.get("layout") != _STRIDED:
        raise ModelFileError(f"{what} is declared with a type of numbers or a layout that is not supported")
    limits.check_size(sizes, what, dtype.itemsize)
    stored = int(reader.get_record_size(record)) if reader.has_record(record) else 0
    elements = math.prod(sizes)
    last = offset[0] + sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1 if elements else offset[0]
    if elements and not stored:
        refuse(what, record, f"is declared with {elements} elements but stores nothing")
    if last * dtype.itemsize > stored or stored % dtype.itemsize:
        refuse(what, record, f"is declared with {last * dtype.itemsize} bytes but stores {stored}")
    if elements > max(_SMALL, stored // dtype.itemsize):
        refuse(what, record, f"is declared with {elements} elements out of {stored} bytes")
    if (record, dtype) not in payloads:
        flat = torch.empty(0, dtype=dtype)
        if stored:
            raw = reader.get_storage_from_record(record, stored // dtype.itemsize, dtype)
            flat.set_(raw.untyped_storage(), 0, (stored // dtype.itemsize,), (1,))
        payloads[record, dtype] = flat
    return (
        payloads[record, dtype].as_strided(sizes, strides, offset[0]) if elements else torch.empty(sizes, dtype=dtype)
    )


def _numbers(declared: Any) -> tuple[int, ...] | None:
    """Sizes, strides or offsets; None where one is not a plain number of 0 or more."""
    if not isinstance(declared, list):
        return None
    found: list[Any] = [
        value.get("as_int") if isinstance(value, dict) and len(value) == 1 else -1 for value in declared
    ]
    return tuple(found) if all(type(value) is int and value >= 0 for value in found) else None


def _samples(reader: Any, records: list[str], where: str) -> tuple[Any, Any] | None:
    """The example inputs: torch's restricted unpickling must read them as two containers of plain tensors."""
    if _SAMPLES not in records or reader.get_record_size(_SAMPLES) == 0:
        return None
    try:
        check_pickle(reader.get_record(_SAMPLES), _SAMPLES)
        samples = torch.load(io.BytesIO(reader.get_record(_SAMPLES)), weights_only=True, map_location="cpu")
    except Exception:
        refuse(where, _SAMPLES, "is a pickle of something other than tensors")
    pending, seen = [samples], set()
    while pending:
        value = pending.pop()
        if isinstance(value, (list, tuple, dict)):
            if (
                value and id(value) in seen
            ):  # each level twice the one below, or inside itself: whoever walks it does not end
                refuse(where, _SAMPLES, "has one container in two places")
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor):
            _check_sample(value, where)
        elif not isinstance(value, (int, float, str, bool, type(None))):
            refuse(where, _SAMPLES, f"holds a {type(value).__name__}")
    if samples is None:
        return None
    if (
        not isinstance(samples, tuple)
        or len(samples) != 2
        or not isinstance(samples[0], tuple)
        or not isinstance(samples[1], dict)
    ):
        raise ModelFileError(f"not a model file: {_SAMPLES} in {where} is malformed")
    return samples


def _check_sample(value: Tensor, where: str) -> None:
    if (
        type(value) not in (Tensor, torch.nn.Parameter)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or value.dtype not in _DTYPES
    ):
        refuse(where, _SAMPLES, "holds a tensor that is not plain")
    limits.check_size(value.shape, f"{where}: an example input", value.element_size())
    if value.numel() > max(_SMALL, value.untyped_storage().nbytes() // value.element_size()):
        refuse(where, _SAMPLES, f"holds a tensor of {value.numel()} elements that repeats a smaller one")
