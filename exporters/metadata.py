"""What the file says about itself: keys of an exported model's metadata, written and read back.

| key | holds |
|---|---|
| `repquant_fx.version`, `.method`, `.bits` | text |
| `repquant_fx.target` | the name of the target, unless it is the default one (see `repquant_fx.targets`) |
| `repquant_fx.recipe` | JSON: the effective settings |
| `repquant_fx.preprocessing` | JSON, where known: how images are prepared |
| `repquant_fx.layers` | JSON: `Layers` |

A file is not trusted: what is read is checked against these types, and a misfit names its field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import onnx

from repquant_fx import described
from repquant_fx.errors import ModelFileError
from repquant_fx.security.schema import Misfit, Within, parse, read
from repquant_fx.targets import DEFAULT
from repquant_fx.version import VERSION

if TYPE_CHECKING:
    from repquant_fx.recipe import Recipe

PREFIX = "repquant_fx."
RECORD = "layers"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoredSite(described.Activation):
    """With its grid in words, and the name of the tensor that is its scale."""

    grid: str
    scale: str


@dataclass(frozen=True, kw_only=True)
class StoredWeight(described.Weight):
    """With the name of the tensor that holds its codes."""

    codes: str


@dataclass(frozen=True, kw_only=True)
class StoredLayer(described.Layer):
    """With what it reads; `kind` is that of its group."""

    kind: str
    sites: tuple[StoredSite, ...]
    weight: StoredWeight | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What is read of a timm data config. A cropped share of the image near zero would enlarge it without bounds."""

    input_size: tuple[Annotated[int, Within(1, 1 << 14)], ...] | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | float | None = None
    std: tuple[float, ...] | float | None = None
    crop_pct: Annotated[float, Within(0.05, 16)] | None = None
    crop_mode: str | None = None


@dataclass(frozen=True)
class Layers:
    """The record of a file's layers, in graph order, and what was left alone."""

    layers: tuple[StoredLayer, ...]
    left_alone: tuple[described.Reason, ...]


# ---- writing ---------------------------------------------------------------------------------------------------------


def describe(recipe: Recipe, preprocessing: Mapping[str, Any] | None, layers: str | None = None,
             target: str = DEFAULT) -> dict[str, str]:
    """The entries of a file, by key with the prefix.

    Args:
        layers: what `record` gives.
        target: the name of one; the default one is not said.
    """
    activations = [recipe.norm + " norms", recipe.softmax + " softmax",
                   f"{recipe.clipping} clipping" if recipe.clipping != "none" else "no clipping"]
    parts = [*(["weights alone"] if recipe.weight_only else activations),
             "GPTQ" if recipe.gptq else "round to nearest"]
    entries = {
        "version": VERSION,
        "method": "RepQuant (arXiv 2402.05628): " + ", ".join(parts),
        "bits": recipe.bits + (" with per-layer overrides" if recipe.layers else ""),
        "recipe": json.dumps(recipe.to_dict(), sort_keys=True),
    }
    if preprocessing is not None:
        entries["preprocessing"] = json.dumps(dict(preprocessing), sort_keys=True)
    if layers is not None:
        entries[RECORD] = layers
    if target != DEFAULT:
        entries["target"] = target
    return {PREFIX + key: value for key, value in entries.items()}


def record(layers: Sequence[Mapping[str, Any]], left_alone: Sequence[Any], tensors: Mapping[str, str]) -> str:
    """The JSON text that a file keeps of its layers; `Metadata.layers` reads it.

    Args:
        layers: of `report.describe_layers`.
        left_alone: `passes.base.LeftAlone` items.
        tensors: names of constants in the file: the scale of a site by its name, the codes of a weight by its node's.
    """
    entries = []
    for layer in layers:
        sites = [{"name": site["name"], "bits": site["bits"], "grid": _grid(site),
                  "scale": tensors.get(site["name"], ""),
                  **({"zero_code": site["zero_code"]} if "zero_code" in site else {})}
                 for site in layer["inputs"]]
        entry = {"path": layer["path"], "operator": layer["operator"], "kind": layer["group"], "sites": sites,
                 "rewritten": layer["rewritten"]}
        if "weight" in layer:
            entry["weight"] = {"bits": layer["weight"]["bits"], "codes": tensors.get(layer["node"], "")}
        entries.append(entry)
    reasons = [{"path": item.path, "operator": item.operator, "reason": item.reason} for item in left_alone]
    return json.dumps({"layers": entries, "left_alone": reasons}, separators=(",", ":"))


def _grid(site: Mapping[str, Any]) -> str:
    kind = site.get("quantizer", "none")
    if kind == "none":
        return "float"
    steps = site.get("codes_per_octave")
    return kind if steps is None else f"log2, {steps} code{'s' * (steps > 1)} per octave"


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The entries of a file under our prefix, by key without it; none of a file that somebody else wrote.

    Attributes:
        source: the file, for messages.
        entries: as stored, text that nobody has read yet.
    """

    source: str
    entries: Mapping[str, str]

    @classmethod
    def of(cls, model: onnx.ModelProto, source: str) -> Metadata:
        """Those of a model.

        Raises:
            ModelFileError: an entry is no text, or is given twice.
        """
        entries: dict[str, str] = {}
        for entry in model.metadata_props:
            if not isinstance(entry.key, str) or not entry.key.startswith(PREFIX):
                continue
            if not isinstance(entry.value, str):  # protobuf gives bytes where they are not UTF-8
                raise ModelFileError(f"{source}: the metadata {entry.key} is not UTF-8 text")
            key = entry.key.removeprefix(PREFIX)
            if key in entries:
                raise ModelFileError(f"{source}: the metadata {entry.key} is given twice")
            entries[key] = entry.value
        return cls(source, entries)

    def version(self) -> str:
        """The version of repquant-fx that wrote the file.

        Raises:
            ModelFileError: none did.
        """
        if "version" not in self.entries:
            raise ModelFileError(f"{self.source} was not written by repquant-fx: its metadata holds no {PREFIX}version")
        return self.entries["version"]

    def target(self) -> str:
        """The name of the target that the file was written for; text that nobody has judged."""
        return self.entries.get("target", DEFAULT)

    def layers(self) -> Layers:
        """What was done to the layers.

        Raises:
            ModelFileError: no record is kept, or it is not readable.
        """
        layers = self._json(RECORD, Layers)
        if layers is None:
            raise ModelFileError(f"{self.source} holds no readable record of its layers ({PREFIX}{RECORD}); it was "
                                 f"written by repquant-fx {self.version()}: compile the model again")
        return layers

    def recipe(self) -> dict[str, Any] | None:
        """The settings as data, None where none are stored; `Recipe.from_dict` judges them.

        Raises:
            ModelFileError: not readable.
        """
        return self._json("recipe", dict[str, Any])

    def preprocessing(self) -> dict[str, Any] | None:
        """The timm data config, None where none is stored.

        Raises:
            ModelFileError: not readable, or no `Preprocessing`.
        """
        self._json("preprocessing", Preprocessing)
        return self._json("preprocessing", dict[str, Any]) or None

    def _json(self, key: str, kind: type[T]) -> T | None:
        if key not in self.entries:
            return None
        try:
            data = parse(self.entries[key])
            return None if data is None else read(kind, data)
        except Misfit as error:
            raise ModelFileError(f"{self.source}: the metadata {PREFIX}{key} cannot be read: {error}") from error
