"""What the metadata of an exported file and a report both say of a layer, checked when either is read.

Each adds what it alone knows, under names of its own: a file the tensors that hold scales and codes, a report figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from repquant_fx.security.schema import Within

Bits = Annotated[int, Within(2, 8)]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What a layer reads. `zero_code` is the code of a logarithmic grid that stands for zero.

    Attributes:
        bits: 32 where it stays in float.
    """

    name: str
    bits: Annotated[int, Within(2, 32)]
    zero_code: Annotated[int, Within(0, 255)] | None = None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A quantized weight."""

    bits: Bits


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized operator, and what was done to the graph around it."""

    path: str
    operator: str
    rewritten: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A norm, Softmax or product that is not quantized or rewritten, and why."""

    path: str
    operator: str
    reason: str
