"""A report that `compile --report` wrote, read back: the fields that the page draws are checked, others stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from repquant_fx import described
from repquant_fx.errors import InputError
from repquant_fx.files import irregular
from repquant_fx.security.schema import LONGEST, Misfit, Within, parse, read

Count = Annotated[int, Within(0, 1 << 53)]
Numbers = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Operand(described.Activation):
    """What a layer reads; of `report.describe_site`."""

    quantizer: str | None = None
    scale: float | list[float] | None = None
    zero_point: int | list[int] | None = None
    codes_per_octave: Count | None = None


@dataclass(frozen=True)
class ScaleRange:
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class OutputError:
    round_to_nearest: float | None = None
    chosen: float | None = None


@dataclass(frozen=True, kw_only=True)
class Weight(described.Weight):
    granularity: str | None = None
    method: str | None = None
    scale: ScaleRange | None = None
    output_error: OutputError | None = None


@dataclass(frozen=True, kw_only=True)
class Layer(described.Layer):
    """Of `report.describe_layers`."""

    node: str | None = None
    group: str | None = None
    inputs: list[Operand] = field(default_factory=list)
    weight: Weight | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Product:
    path: str
    op: str
    integer: bool
    reason: str


@dataclass(frozen=True)
class Quantizer:
    share_step: float


@dataclass(frozen=True)
class Parity:
    quantizers: dict[str, Quantizer]
    agrees: bool | None = None


@dataclass(frozen=True)
class Calibration:
    origin: str | None = None
    samples: Count = 0
    held_back: Count = 0
    synthetic: bool | None = None
    seed: Count = 0


@dataclass(frozen=True)
class Histogram:
    low: float
    high: float
    counts: list[Count]


@dataclass(frozen=True)
class Boxes:
    quantiles: list[Numbers]
    span: float | None
    low: float | Numbers | None
    up: float | Numbers | None


@dataclass(frozen=True)
class Activation:
    """Of `statistics.channels`, `probabilities` or `values`; which fields it has, its kind says."""

    same_as: str | None = None
    kind: str | None = None
    bits: described.Bits | None = None
    steps: Count | None = None
    total: Count | None = None
    channels: list[Count] | None = None
    before: Boxes | None = None
    after: Boxes | None = None
    histograms: list[Histogram] | None = None
    histogram: Histogram | None = None
    levels: Numbers | None = None
    logarithms: Histogram | None = None
    values: Histogram | None = None
    zeros: float | None = None
    below: float | None = None
    low: float | None = None
    up: float | None = None


@dataclass(frozen=True)
class Errors:
    weight: float | None
    output: float | None
    channels: Numbers | None


@dataclass(frozen=True)
class Rounding:
    """Of `statistics.rounding`."""

    method: str
    total: Count
    nearest: Errors
    chosen: Errors


@dataclass(frozen=True)
class Statistics:
    activations: dict[str, Activation]
    weights: dict[str, Rounding]


@dataclass(frozen=True)
class Report:
    """Of `report.build`, with the statistics where they were collected."""

    layers: list[Layer]
    recipe: dict[str, Any] | None
    source: str | None = None
    bits: str | None = None
    target: str | None = None
    repquant_fx: str | None = None
    output_sqnr_db: float | None = None
    file_bytes: Count | None = None
    float_bytes: Count | None = None
    peak_memory_mb: float | None = None
    calibration: Calibration | None = None
    parity: Parity | None = None
    kernels: list[Product] | None = None
    left_alone: list[described.Reason] | None = None
    statistics: Statistics | None = None


def _rename_former_keys(layers: list[Any]) -> None:
    """The one key that reports had under another name, in place; nothing here was checked yet."""
    for layer in layers:
        operands = layer.get("inputs") if isinstance(layer, dict) else None
        for operand in operands if isinstance(operands, list) else ():
            if isinstance(operand, dict) and "codes_an_octave" in operand:
                operand.setdefault("codes_per_octave", operand.pop("codes_an_octave"))


def read_report(path: Path) -> dict[str, Any]:
    """The data of a report, checked.

    Raises:
        InputError: it cannot be read, is none, or a field has another type or range than `compile` writes; the message
            names the field.
    """
    if kind := irregular(path):
        raise InputError(f"cannot read report {path}: it is {kind}")
    try:
        if path.stat().st_size > LONGEST:
            raise InputError(f"cannot read report {path}: it has more than {LONGEST >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read report {path}: {error}") from error
    try:
        report = parse(text)
        if not isinstance(report, dict) or not isinstance(report.get("layers"), list) or "recipe" not in report:
            raise InputError(f"{path} is not a report that compile --report wrote")
        _rename_former_keys(report["layers"])
        read(Report, report)
    except Misfit as error:
        raise InputError(f"cannot read report {path}: {error}") from error
    return report
