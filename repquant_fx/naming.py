"""Derived names, spelled here alone: what is made of layers and tensors is called after them, and can be read back.

    blocks.0.attn.qkv/input             a site: the layer that reads a value, and the operand
    blocks.0.attn.qkv.input             its stem: what its constants and codes are called after
    blocks.0.attn.qkv.input_scale       its scale; so with `_zero_point`, `_quantized` and the other suffixes below
    blocks.0.attn.qkv.weight_quantized  a weight's codes: the stem of a weight is its own name
    blocks.0.attn.qkv.bias              what belongs beside the weight

A number that keeps two names apart goes to the stem (`fc.weight_2_scale`), so that a suffix can always be taken off
again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Suffix:
    """One kind of derived name."""

    text: str

    def of(self, stem: str) -> str:
        """The name of this kind that is derived from `stem`."""
        return stem + self.text

    def stem(self, name: str) -> str | None:
        """What a name of this kind is derived from; None for other names."""
        return name.removesuffix(self.text) if name.endswith(self.text) else None


SCALE, ZERO_POINT, SHIFT = Suffix("_scale"), Suffix("_zero_point"), Suffix("_shift")
QUANTIZED, DEQUANTIZED = Suffix("_quantized"), Suffix("_dequantized")
ROUNDED = Suffix("_rounded")  # codes before they saturate
ZERO_POINT_UINT4, ZERO_POINT_INT4 = Suffix("_zero_point_uint4"), Suffix("_zero_point_int4")
ZERO_POINT_INT8 = Suffix("_zero_point_int8")  # of codes that are signed
LOG_STEP = Suffix("_log_step")  # what two codes of a logarithmic grid are apart, in logarithms
INT8, UINT8 = Suffix("_int8"), Suffix("_uint8")  # codes unpacked from, and widened from, four bits
HIGHEST = Suffix(".highest")  # the value of the highest code, of the node that saturates there
WEIGHT = Suffix(".weight")  # of a node, for one that was not read from a constant of its own
MASK_OPEN, MASK_CLOSED = "mask_open", "mask_closed"  # what a mask adds to scores
TRANSPOSED, PATCHES = Suffix("_t"), Suffix("_patches")  # weights whose axes were put in another order
# what a stem may carry
DERIVED = (SCALE, ZERO_POINT, SHIFT, QUANTIZED, ROUNDED, DEQUANTIZED, ZERO_POINT_UINT4, ZERO_POINT_INT4,
           ZERO_POINT_INT8)


def site(path: str, operand: str) -> str:
    """Name of an activation: the module path of the layer that reads it (or a node's name), and which operand it is
    there.
    """
    return f"{path}/{operand}"


def site_operand(name: str) -> str:
    """`input` of `blocks.0.fc/input`."""
    return name.rpartition("/")[2]


def site_stem(name: str) -> str:
    """What the constants of a site are called after: `blocks.0.fc.input` for `blocks.0.fc/input`."""
    return name.replace("/", ".")


def onnx_node(path: str, operator: str) -> str:
    """A node of the file: `blocks.0.fc/MatMul` for a module's path, or that of the node that it stands beside."""
    return f"{path}/{operator}" if path else operator


def onnx_output(node: str, index: int) -> str:
    """What a node of the file gives: called as it is, and numbered from the second output."""
    return node if index == 0 else f"{node}:{index}"


def onnx_input(node: str, parameter: str) -> str:
    """A constant that a node of the file reads and that has no name of its own: `blocks.0.fc/Reshape.shape`."""
    return f"{node}.{parameter}"


def attribute_name(name: str) -> str:
    """A name that one attribute can have. Different names may become one: keep them apart with `Names`."""
    return re.sub(r"\W", "_", name)


def beside(weight: str, what: str) -> str:
    """What belongs beside a weight: `fc.bias` for `fc.weight` or `fc.weight_t`, `q_bias` for `q_weight`, `w_bias` for
    `w`.
    """
    path, dot, leaf = weight.rpartition(".")
    head, separator, _ = leaf.rpartition("weight")
    return f"{path}{dot}{head}{what}" if separator else f"{weight}_{what}"


def unique(name: str, taken: Callable[[str], bool]) -> str:
    """`name`, or the first of `name_2`, `name_3`... that is not taken."""
    candidate, count = name, 1
    while taken(candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


class Names:
    """Hands out each name once, with a number where it was taken."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._given: Counter[str] = Counter(taken)

    def unique(self, name: str) -> str:
        while True:
            self._given[name] += 1
            if self._given[name] == 1:
                return name
            name = f"{name}_{self._given[name]}"

    def __contains__(self, name: str) -> bool:
        return name in self._given
