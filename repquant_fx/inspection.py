"""What was done to a model, read from its file alone; or what would be done to one that is not compiled yet.

The exporter keeps a short record of the layers in the file's metadata (`record`): kinds, rewritings, reasons and the names of the
tensors. Scales, zero points and sizes are read from these tensors, so that what is shown is what the file computes with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import onnx

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.exporters.metadata import PREFIX
from repquant_fx.files import MODEL, irregular
from repquant_fx.naming import QUANTIZED, SCALE, ZERO_POINT, ZERO_POINT_UINT4, beside, site_operand

RECORD = "layers"  # key of the metadata
KINDS = {"norm_linear": "norm → linear", "linear": "linear", "conv": "convolution", "matmul": "matmul"}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Row:
    """One quantized activation and the layers that read it.

    Attributes:
        site: module path and operand, such as `blocks.0.attn/probabilities`.
        layers: module paths of what reads it.
        kind: such as `norm → linear`, `softmax → matmul`.
        bits: of the activation's codes; weight_bits: of the weights behind, one a layer that has some.
        grid: `uniform`, `uniform per channel`, `log2, N codes an octave`; empty before compiling, `float` where it was not quantized.
        scale, zero_point: of the activation; lists where it has one a channel. The zero point of a logarithmic grid is its code of
            exact zero. None before compiling.
        rewritten: what was done to the graph around it.
        integer: whether ONNX Runtime computes the products with integers; None where that is not known.
        reason: why not all of them are.
        parameters: number of weights behind, and bytes that they, their scales and their biases take; 0 before compiling.
    """

    site: str
    layers: list[str]
    kind: str
    bits: int
    weight_bits: list[int] = field(default_factory=list)
    grid: str = ""
    scale: float | list[float] | None = None
    zero_point: int | list[int] | None = None
    rewritten: list[str] = field(default_factory=list)
    integer: bool | None = None
    reason: str = ""
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """The rows, what was left alone and why, and totals.

    Attributes:
        source: the file or model.
        compiled: whether it is an exported file (else: what would be matched).
        left_alone: path, operator and reason of every norm, softmax or product that is not quantized or rewritten.
        about: totals and what the file says of itself.
    """

    source: str
    compiled: bool
    rows: list[Row]
    left_alone: list[dict[str, str]]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def record(layers: Sequence[Mapping[str, Any]], left_alone: Sequence[Any], tensors: Mapping[str, str]) -> str:
    """The JSON text that a file keeps of its layers.

    Args:
        layers: of `report.describe_layers`.
        left_alone: `match_sites.LeftAlone` items.
        tensors: names of constants in the file: the scale of a site by its name, the codes of a weight by its node's.
    """
    entries = []
    for layer in layers:
        sites = [{"name": site["name"], "bits": site["bits"], "grid": _grid(site), "scale": tensors.get(site["name"], ""),
                  **({"zero_code": site["zero_code"]} if "zero_code" in site else {})} for site in layer["inputs"]]
        entry = {"path": layer["path"], "operator": layer["operator"], "kind": layer["group"], "sites": sites, "rewritten": layer["rewritten"]}
        if "weight" in layer:
            entry["weight"] = {"bits": layer["weight"]["bits"], "codes": tensors.get(layer["node"], "")}
        entries.append(entry)
    return json.dumps({"layers": entries, "left_alone": [asdict(item) for item in left_alone]}, separators=(",", ":"))


def _grid(site: Mapping[str, Any]) -> str:
    kind = site.get("quantizer", "none")
    if kind == "none":
        return "float"
    steps = site.get("codes_an_octave")
    return kind if steps is None else f"log2, {steps} code{'s' * (steps > 1)} an octave"


# ---- a file -------------------------------------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    """Whether a source is an exported file."""
    return Path(source).suffix.lower() == ".onnx"


def read_metadata(path: str | Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """(the model, its metadata under our prefix).

    Raises:
        ModelFileError: not an ONNX file, or not one that repquant-fx wrote.
    """
    if kind := irregular(Path(path)):
        raise ModelFileError(f"{path} is {kind}, not a file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelFileError(f"no such file: {path}") from error
    except Exception as error:
        raise ModelFileError(f"{path} is not an ONNX model: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    metadata = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    if "version" not in metadata:
        raise ModelFileError(f"{path} was not written by repquant-fx: its metadata holds no {PREFIX}version")
    return model, metadata


def inspect_file(path: str | Path, *, audit: bool = True) -> Inspection:
    """What was done to the model in an exported file.

    Args:
        audit: ask ONNX Runtime which products it computes with integers (it optimizes the graph once for that).

    Raises:
        ModelFileError: not a file of repquant-fx, or one of a version that kept no record.
    """
    model, metadata = read_metadata(path)
    try:
        kept = json.loads(metadata[RECORD])
        layers, left_alone = kept["layers"], [{key: str(item[key]) for key in ("path", "operator", "reason")} for item in kept["left_alone"]]
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        rows = _rows(layers, tensors, _audited(path, layers) if audit else {})
        recipe = json.loads(metadata.get("recipe", "null"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{path} holds no readable record of its layers ({PREFIX}{RECORD}); it was written by repquant-fx "
                             f"{metadata['version']}: compile the model again") from error
    weights = sum(row.bytes for row in rows)
    quantized = sum(row.parameters for row in rows)
    stored = sum(_bytes(tensor) for tensor in tensors.values())
    about = {"version": metadata["version"], "method": metadata.get("method"), "bits": metadata.get("bits"), **_totals(rows),
             "quantized_bytes": weights, "other_bytes": stored - weights, "file_bytes": Path(path).stat().st_size,
             "float_bytes": stored - weights + quantized * FLOAT_BYTES, "recipe": recipe}
    return Inspection(str(path), True, rows, left_alone, about)


def _rows(layers: Sequence[Mapping[str, Any]], tensors: Mapping[str, onnx.TensorProto], audited: Mapping[int, tuple[bool, str]]) -> list[Row]:
    """One row a site: layers that share a site share its row."""
    rows: dict[str, Row] = {}
    for index, layer in enumerate(layers):
        integer, reason = audited.get(index, (None, ""))
        weight = layer.get("weight")
        for site in layer["sites"]:
            row = rows.get(site["name"]) or _site_row(layer, site, tensors)
            if weight is not None:
                codes = tensors.get(weight["codes"])
                row = replace(row, weight_bits=[*row.weight_bits, weight["bits"]], parameters=row.parameters + _elements(codes),
                              bytes=row.bytes + sum(_bytes(tensors.get(name)) for name in _constants(weight["codes"])))
            states = [s for s in (row.integer if row.layers else integer, integer) if s is not None]
            rows[site["name"]] = replace(row, layers=[*row.layers, layer["path"]], integer=all(states) if states else None,
                                         reason="; ".join(dict.fromkeys(r for r in (row.reason, reason) if r)))
    return list(rows.values())


def _site_row(layer: Mapping[str, Any], site: Mapping[str, Any], tensors: Mapping[str, onnx.TensorProto]) -> Row:
    scale = tensors.get(site["scale"])
    stem = SCALE.stem(site["scale"]) or site["scale"]
    zero = tensors.get(ZERO_POINT.of(stem), tensors.get(ZERO_POINT_UINT4.of(stem)))
    return Row(site["name"], [], kind_of(layer["kind"], site["name"]), site["bits"], grid=site["grid"],
               scale=None if scale is None else onnx.numpy_helper.to_array(scale).tolist(),
               zero_point=site.get("zero_code", None if zero is None else onnx.numpy_helper.to_array(zero).tolist()),
               rewritten=list(layer["rewritten"]), bytes=_bytes(scale) + _bytes(zero))


def kind_of(group: str, site: str) -> str:
    """What stands before and behind a site, in words."""
    return "softmax → matmul" if group == "matmul" and site_operand(site).startswith("probabilities") else KINDS.get(group, group)


def _constants(codes: str) -> list[str]:
    """Names of the tensors that belong to a layer's weight: codes, scales, zero points, those of the bias and of codes that the layer writes."""
    weight = QUANTIZED.stem(codes) or codes
    bias, output = beside(weight, "bias"), beside(weight, "output")
    return [codes, SCALE.of(weight), ZERO_POINT.of(weight), bias, QUANTIZED.of(bias), SCALE.of(bias), SCALE.of(output), ZERO_POINT.of(output)]


def _elements(tensor: onnx.TensorProto | None) -> int:
    return 0 if tensor is None else math.prod(tensor.dims)


def _bytes(tensor: onnx.TensorProto | None) -> int:
    if tensor is None:
        return 0
    return len(tensor.raw_data) or _elements(tensor) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _audited(path: str | Path, layers: Sequence[Mapping[str, Any]]) -> dict[int, tuple[bool, str]]:
    """(whether ONNX Runtime computes it with integers, why not) of each layer, by its index; empty where there is no audit."""
    try:
        from repquant_fx.audit import audit
    except ImportError:
        return {}
    products: dict[str, list[Any]] = {}
    for product in audit(path):
        products.setdefault(product.path.split("/")[0], []).append(product)
    indices: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        indices.setdefault(layer["path"], []).append(index)
    found = {}
    for where, owners in indices.items():
        inside = products.get(where, [])
        paired = len(inside) == len(owners)  # both are in graph order
        for position, index in enumerate(owners):
            own = inside[position:position + 1] if paired else inside
            if own:
                reasons = dict.fromkeys(product.reason for product in own if not product.integer and product.reason)
                found[index] = all(product.integer for product in own), "; ".join(reasons)
    return found


# ---- a model that is not compiled yet -----------------------------------------------------------------------------------------


def inspect_model(model: Any, recipe: Any = None, **options: Any) -> Inspection:
    """What `compile` would match, and why not, without calibrating anything.

    Args:
        model, options: as for `compile`: `arch`, `input_shape`, `allow_pickle`, `task`, `example_inputs`.

    Raises:
        InputError: the model cannot be loaded or captured.
    """
    from torch.fx import Node

    from repquant_fx.compiler import match
    from repquant_fx.passes.base import shape_of

    matched = match(model, recipe, **options)
    rows = []
    for group in matched.plan.groups:
        weights = [] if group.kind == "matmul" else [
            (group.plans[c].wbits, math.prod(map(int, shape_of(cast(Node, c.args[1]))))) for c in group.consumers]
        for site in group.sites:
            behind = [w for w, c in zip(weights, group.consumers) if c in site.consumers]
            rows.append(Row(site.name, [_path(c) for c in site.consumers], kind_of(group.kind, site.name), site.bits,
                            [bits for bits, _ in behind], rewritten=list(group.notes), parameters=sum(count for _, count in behind)))
    about = {"bits": f"W{matched.recipe.wbits}A{matched.recipe.abits}", **_totals(rows), "recipe": matched.recipe.to_dict()}
    return Inspection(matched.loaded.source, False, rows, [asdict(item) for item in matched.plan.left_alone], about)


def _path(node: Any) -> str:
    from repquant_fx.passes.base import module_path

    return module_path(node) or str(node.name)


def _totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts over the rows."""
    known = [row.integer for row in rows if row.integer is not None]
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return {"sites": len(rows), "kinds": kinds, "quantized_parameters": sum(row.parameters for row in rows),
            "integer_sites": sum(known) if known else None}


def inspect(source: str, recipe: Any = None, **options: Any) -> Inspection:
    """`inspect_file` of a `.onnx` or of the one in a directory that `compile` wrote, `inspect_model` of anything else.

    Raises:
        InputError: it cannot be read, or a recipe was given for a file that has its own.
    """
    if (Path(source) / MODEL).is_file():
        source = str(Path(source) / MODEL)
    if not is_file(source):
        return inspect_model(source, recipe, **options)
    from repquant_fx.recipe import Recipe

    if recipe not in (None, Recipe()):
        raise InputError(f"{source} is compiled and holds its recipe; a recipe and its switches are for models that are not compiled yet")
    return inspect_file(source)
