"""The size of weights, in two counts.

`stored` is what the exporter writes: up to 4 bits two codes per byte, else one. 2 and 3 bits then save nothing over
4, nor 5 to 7 over 8. `information` counts the bits themselves, as a packed or compressed container would hold them.
Scales and biases are left out
of both: they cost the same at any bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from repquant_fx.errors import InputError
from repquant_fx.exporters.packing import PACKED_BITS
from repquant_fx.sensitivity.units import WEIGHTS, Unit

COUNTS = ("stored", "information")
_UNITS = {"B": 1, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def bits_counted(bits: int, count: str) -> int:
    """Bits that one weight of so many bits takes."""
    return bits if count == "information" else PACKED_BITS if bits <= PACKED_BITS else 8


def weight_bits(units: Sequence[Unit], bits: Mapping[Unit, int], count: str) -> int:
    """Size of all weights, in bits."""
    return sum(unit.elements * bits_counted(bits[unit], count) for unit in units if unit.kind == WEIGHTS)


def read_size(text: str, weights: int) -> int:
    """A size in bits: `400kB`, `1.5MB`, or `3.5b` for bits per weight.

    Args:
        weights: how many there are.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match and match[2] == "b":
        return round(float(match[1]) * weights)
    if match and match[2] in _UNITS:
        return round(float(match[1]) * 8 * _UNITS[match[2]])
    raise InputError(
        f"--target-size takes a size such as 400kB or 1.5MB, or bits per weight such as 3.5b; found {text!r}"
    )
