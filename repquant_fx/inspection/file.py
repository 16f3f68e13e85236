"""What was done to the model in an exported file.

The exporter keeps a short record of the layers in the file's metadata (`exporters.metadata.Layers`): kinds, rewritings,
reasons and the names of the tensors. Scales, zero points and sizes are read from these tensors, so that what is shown
is what the file computes with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from repquant_fx.errors import ModelFileError, RepQuantWarning
from repquant_fx.exporters.apart import is_apart, place_of
from repquant_fx.exporters.metadata import StoredLayer, StoredSite
from repquant_fx.exporters.reading import OnnxFile, read_onnx
from repquant_fx.fit import misfit
from repquant_fx.inspection.table import Inspection, Row, kind_of, totals
from repquant_fx.naming import LOG_STEP, QUANTIZED, SCALE, ZERO_POINT, ZERO_POINT_INT8, ZERO_POINT_UINT4, beside
from repquant_fx.runtimes import loader
from repquant_fx.runtimes import version as version_of
from repquant_fx.security.guard import guarded
from repquant_fx.targets import RUNTIMES, TARGETS

FLOAT_BYTES = 4
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
INTEGERS = {TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.INT32,
            TensorProto.UINT4, TensorProto.INT4}


def is_file(source: str) -> bool:
    """Whether a source is an exported file."""
    return Path(source).suffix.lower() == ".onnx"


def inspect_file(path: str | Path, *, audit: bool = True) -> Inspection:
    """What was done to the model in an exported file.

    Args:
        audit: ask ONNX Runtime which products it computes with integers (it optimizes the graph once for that); of a
            file for OpenVINO that, where it is installed.

    Warns where this processor computes something else with its integers (see `fit`).

    Raises:
        ModelFileError: not a file of repquant-fx, one of a version that kept no record, or one that is refused (see
            `read_onnx`).
    """
    file = read_onnx(path)
    metadata = file.metadata
    version, record, recipe = metadata.version(), metadata.layers(), metadata.recipe()
    tensors = {tensor.name: tensor for tensor in file.model.graph.initializer}
    runtime = _audited_in(metadata.target()) if audit else "ort"
    loader(runtime)  # imported before the guard
    with guarded(f"reading {path}"):  # ONNX Runtime folds constants: it runs what the file says
        audited = _audited(file, record.layers, runtime) if audit else {}
    if sentence := misfit(file.apart):
        warnings.warn(f"{path}: {sentence}", RepQuantWarning, stacklevel=2)
    rows = _rows(record.layers, tensors, audited, str(path))
    weights = sum(row.bytes for row in rows)
    quantized = sum(row.parameters for row in rows)
    stored = sum(_bytes(tensor) for tensor in tensors.values())
    opset = next((entry.version for entry in file.model.opset_import if not entry.domain), None)
    about = {"version": version, "target": metadata.target(), "opset": opset,
             "method": metadata.entries.get("method"), "bits": metadata.entries.get("bits"),
             **({"audited_in": RUNTIMES[runtime]} if runtime != "ort" else {}),
             **totals(rows, sum(layer.weight is None for layer in record.layers)),
             "quantized_bytes": weights, "other_bytes": stored - weights, "file_bytes": file.bytes,
             "float_bytes": stored - weights + quantized * FLOAT_BYTES, "recipe": recipe}
    return Inspection(str(path), True, rows, [asdict(item) for item in record.left_alone], about)


def _rows(layers: Sequence[StoredLayer], tensors: Mapping[str, onnx.TensorProto],
          audited: Mapping[int, tuple[bool, str]], source: str) -> list[Row]:
    """One row per site: layers that share a site share its row."""
    readers: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for site in layer.sites:
            readers.setdefault(site.name, []).append(index)
    rows = []
    for name, indices in readers.items():
        first = layers[indices[0]]
        row = _site_row(first, next(site for site in first.sites if site.name == name), tensors, source)
        weights = [weight for weight in (layers[index].weight for index in indices) if weight is not None]
        states = [audited[index] for index in indices if index in audited]
        rows.append(replace(
            row, layers=[layers[index].path for index in indices], weight_bits=[weight.bits for weight in weights],
            parameters=sum(_elements(tensors.get(weight.codes)) for weight in weights),
            bytes=row.bytes + sum(_bytes(tensors.get(each)) for weight in weights for each in _constants(weight.codes)),
            integer=all(integer for integer, _ in states) if states else None,
            reason="; ".join(dict.fromkeys(reason for _, reason in states if reason))))
    return rows


def _site_row(layer: StoredLayer, site: StoredSite, tensors: Mapping[str, onnx.TensorProto], source: str) -> Row:
    stem = SCALE.stem(site.scale) or site.scale
    scale = tensors.get(site.scale, tensors.get(LOG_STEP.of(stem)))
    names = [kind.of(stem) for kind in (ZERO_POINT, ZERO_POINT_UINT4, ZERO_POINT_INT8)]
    zero = next((tensors[name] for name in names if name in tensors), None)
    zero_point = None if zero is None else _numbers(zero, INTEGERS, source)
    number = None if scale is None else _numbers(scale, FLOATS, source)
    if site.scale not in tensors and isinstance(number, float) and isinstance(zero_point, int):  # an inlined function
        number = math.exp(max(-700.0, min(700.0, number * ((1 << site.bits) - 1 - zero_point))))
    return Row(site.name, [], kind_of(layer.kind, site.name), site.bits, grid=site.grid, scale=number,
               zero_point=zero_point if site.zero_code is None else site.zero_code,
               rewritten=list(layer.rewritten), bytes=_bytes(scale) + _bytes(zero))


def _numbers(tensor: onnx.TensorProto, types: set[int], source: str) -> Any:
    """A scale or zero point: one number, or one per channel.

    Raises:
        ModelFileError: of another type or rank, or not finite.
    """
    values = onnx.numpy_helper.to_array(tensor) if tensor.data_type in types and len(tensor.dims) <= 1 else None
    if values is None or not np.isfinite(values.astype(np.float64)).all():
        wanted = "finite numbers, as a scale does" if types is FLOATS else "integers, as a zero point does"
        raise ModelFileError(f"{source}: the tensor {tensor.name!r} must hold one or a list of {wanted}")
    return values.tolist()


def _constants(codes: str) -> list[str]:
    """Names of the tensors that belong to a layer's weight: codes, scales, zero points, those of the bias and of codes
    that the layer writes."""
    weight = QUANTIZED.stem(codes) or codes
    bias, output = beside(weight, "bias"), beside(weight, "output")
    return [codes, SCALE.of(weight), ZERO_POINT.of(weight), bias, QUANTIZED.of(bias), SCALE.of(bias), SCALE.of(output),
            ZERO_POINT.of(output)]


def _elements(tensor: onnx.TensorProto | None) -> int:
    return 0 if tensor is None else math.prod(tensor.dims)


def _bytes(tensor: onnx.TensorProto | None) -> int:
    if tensor is None:
        return 0
    if is_apart(tensor):
        return int(place_of(tensor)["length"])
    return len(tensor.raw_data) or _elements(tensor) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _audited_in(target: str) -> str:
    """The runtime that says which products of a file for `target` are integer ones."""
    found = TARGETS[target].runtime if target in TARGETS else "ort"
    return "openvino" if found == "openvino" and version_of("openvino") else "ort"


def _audited(file: OnnxFile, layers: Sequence[StoredLayer], runtime: str) -> dict[int, tuple[bool, str]]:
    """(whether the runtime computes it with integers, why not) of each layer, by its index; empty where there is no
    audit."""
    try:
        from repquant_fx.audit import audit
    except ImportError:
        return {}
    products: dict[str, list[Any]] = {}
    for product in audit(file, runtime):
        products.setdefault(product.path.split("/")[0], []).append(product)
    indices: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        indices.setdefault(layer.path, []).append(index)
    verdict_of: dict[int, tuple[bool, str]] = {}
    for where, owners in indices.items():
        inside = products.get(where, [])
        paired = len(inside) == len(owners)  # both are in graph order
        if inside:
            verdicts = [_verdict([product]) for product in inside] if paired else [_verdict(inside)] * len(owners)
            verdict_of.update(zip(owners, verdicts))
    return verdict_of


def _verdict(products: Sequence[Any]) -> tuple[bool, str]:
    """Whether all of them are computed with integers, and why not."""
    reasons = dict.fromkeys(product.reason for product in products if not product.integer and product.reason)
    return all(product.integer for product in products), "; ".join(reasons)
