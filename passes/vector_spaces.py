"""The spaces that channel vectors live in, and which vector each element of a value belongs to (see `vector_flow`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from repquant_fx.passes.base import aten, module_path
from repquant_fx.passes.channel_flow import PADDING

CHANNEL_BITS = 20  # of an element's number; the rest is the number of its vector
CHANNELS = (1 << CHANNEL_BITS) - 1


@dataclass
class Space:
    """Values that one rotation serves.

    Attributes:
        size: channels of a vector.
        writers, readers: (node, block): the rows (of a reader: columns) `block * size` to `(block + 1) * size` of a
            Linear or convolution; the last axis of an embedding or a constant.
        norms: norms over vectors of the space.
        products: MatMuls of vectors of the space with one another.
        reason: why it cannot be rotated, '' where it can.
    """

    size: int
    writers: list[tuple[Node, int]] = field(default_factory=list)
    readers: list[tuple[Node, int]] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    products: list[Node] = field(default_factory=list)
    reason: str = ""

    @property
    def fixes_ones(self) -> bool:
        """Whether the rotation must map the vector of ones to itself: a LayerNorm subtracts its direction."""
        return any(norm.target is aten.layer_norm.default for norm in self.norms)


@dataclass
class Vectors:
    """Which vector each element of a value belongs to.

    Attributes:
        numbers: `vector << 20 | channel` of each element, in the value's shape at the example sizes; PADDING for zeros.
        spaces: the space of each vector, shape (vectors,).
    """

    numbers: Tensor
    spaces: Tensor

    def lines(self, axis: int, sizes: Sequence[int]) -> Tensor | None:
        """Spaces of the whole vectors that follow one another along `axis`; None where they are not whole.

        Returns:
            shape (..., blocks), the other axes in order; PADDING where a block holds zeros.
        """
        lines = self.numbers.movedim(axis, -1)
        largest = int(lines.amax()) if lines.numel() else PADDING
        if largest < 0:
            return None
        size = sizes[int(self.spaces[largest >> CHANNEL_BITS])]
        if lines.shape[-1] % size:
            return None
        lines = lines.unflatten(-1, (-1, size))
        padding = (lines == PADDING).all(dim=-1)
        whole = ((lines & CHANNELS) == torch.arange(size)) & (
            (lines >> CHANNEL_BITS) == (lines[..., :1] >> CHANNEL_BITS)
        )
        if not bool((whole.all(dim=-1) | padding).all()):
            return None
        return torch.where(padding, PADDING, self.spaces[(lines[..., 0] >> CHANNEL_BITS).clamp(min=0)])

    def used(self) -> list[int]:
        """The spaces that occur."""
        return torch.unique(self.spaces[torch.unique(self.numbers[self.numbers >= 0] >> CHANNEL_BITS)]).tolist()


def where(space: Space) -> str:
    """A space in words, for reports: the module that first writes into it."""
    node, _ = space.writers[0]
    return module_path(node) or (str(node.target) if node.op == "get_attr" else node.name)
