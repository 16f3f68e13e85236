"""The table that inspecting gives: one row an activation, of a file or of a model that is not compiled yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from repquant_fx.naming import site_operand

KINDS = {
    "norm_linear": "norm → linear", "affine_linear": "affine → linear", "linear": "linear", "conv": "convolution",
    "matmul": "matmul",
}


@dataclass(frozen=True)
class Row:
    """One quantized activation and the layers that read it.

    Attributes:
        site: module path and operand, such as `blocks.0.attn/probabilities`.
        layers: module paths of what reads it.
        kind: such as `norm → linear`, `softmax → matmul`.
        bits: of the activation's codes; weight_bits: of the weights behind, one for each layer that has some.
        grid: `uniform`, `uniform per channel`, `log2, N codes per octave`; empty before compiling, `float` where it was
            not quantized.
        scale, zero_point: of the activation; lists where it has one per channel. The zero point of a logarithmic grid
            is its code of exact zero. None before compiling.
        rewritten: what was done to the graph around it.
        integer: whether ONNX Runtime computes the products with integers; None where that is not known.
        reason: why not all of them are.
        parameters: number of weights behind; bytes: what they, their scales and their biases take, 0 before compiling.
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


def kind_of(group: str, site: str) -> str:
    """What stands before and behind a site, in words."""
    if group == "matmul" and site_operand(site).startswith("probabilities"):
        return "softmax → matmul"
    return KINDS.get(group, group)


def totals(rows: Sequence[Row], products: int) -> dict[str, Any]:
    """Counts over the rows, and of layers: those with weights, as each reads one activation, and the products of two,
    which are counted by the caller.
    """
    audited = [row.integer for row in rows if row.integer is not None]
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return {"sites": len(rows), "kinds": kinds, "weighted_layers": sum(len(row.weight_bits) for row in rows),
            "products": products, "quantized_parameters": sum(row.parameters for row in rows),
            "integer_sites": sum(audited) if audited else None}
