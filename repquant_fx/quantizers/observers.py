"""What sits in the graph at a quantized activation: an observer while calibrating, a quantizer afterwards.

Both are modules that take the activation and return one of the same shape, so that a pass swaps one for the other under
the same name and the graph always runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from repquant_fx.errors import PassError
from repquant_fx.quantizers import logarithmic, uniform
from repquant_fx.quantizers.counted import counted_rows, counted_values, zero_elsewhere

Counts: TypeAlias = Callable[[int], Tensor | None]  # by the batch's number; see `counted`


def everything(number: int) -> None:
    """Counts in every batch."""


class Observer(nn.Module):
    """Returns its input unchanged; while `recording`, keeps what calibration needs in bounded memory.

    Attributes:
        channels: whether statistics are per channel of the last axis.
        capacity: how many values (per channel, or in all) the sample may hold.
        leading: how many slices of the first axis to keep whole, for calibration by a MatMul's output.
    """

    def __init__(self, channels: bool, capacity: int, leading: int = 0) -> None:
        super().__init__()
        self.channels, self.capacity, self.leading = channels, capacity, leading
        self.recording = False
        self.quota = capacity
        self._order: Iterator[int] = itertools.count()
        self._counts: Counts = everything
        self._sample: dict[int, Tensor] = {}  # by the batch's number
        self._whole: dict[int, Tensor] = {}
        self._low: Tensor | None = None
        self._up: Tensor | None = None

    def start(self, batches: int, order: Iterable[int] | None = None, counts: Counts = everything) -> None:
        """Begin recording; the sample is shared out evenly over all `batches`.

        `order` numbers the batches that this observer will see, where others see the rest. What is kept of a batch
        depends on the batch and its number alone. `counts` says what of it is recorded.
        """
        self.recording, self.quota = True, max(1, -(-self.capacity // max(1, batches)))
        self._order, self._counts = itertools.count() if order is None else iter(order), counts

    def forward(self, x: Tensor) -> Tensor:
        if self.recording:
            self._record(x.detach())
        return x

    def _record(self, x: Tensor) -> None:
        number = next(self._order)
        counts = self._counts(number)
        rows = counted_rows(x, counts) if self.channels else counted_values(x, counts)[:, None]
        if len(rows):
            low, up = rows.amin(dim=0), rows.amax(dim=0)
            self._low = low if self._low is None else torch.minimum(self._low, low)
            self._up = up if self._up is None else torch.maximum(self._up, up)
            if len(rows) > self.quota:
                chosen = torch.randint(len(rows), (self.quota,), generator=torch.Generator().manual_seed(number))
                rows = rows[chosen.to(rows.device)]
            self._sample[number] = rows.clone()
        if self.leading > 0 and x.shape[0] > 0:
            self._whole[number] = zero_elsewhere(x, counts)[: self.leading].clone()

    def sample(self) -> Tensor:
        """The recorded sample as (D, N), with the exact extremes of all data appended; D is 1 when not per channel.

        Raises:
            PassError: nothing was recorded.
        """
        if self._low is None or self._up is None:
            raise PassError("an observer has seen no data")
        return torch.cat(
            [*(self._sample[n] for n in sorted(self._sample)), self._low[None], self._up[None]]
        ).T.contiguous()

    def whole(self) -> Tensor:
        """The slices kept whole, concatenated along the first axis."""
        return torch.cat([self._whole[n] for n in sorted(self._whole)])

    def recorded(self) -> dict[str, Tensor]:
        """All that was recorded, to be merged into another observer of the same activation."""
        tensors = {f"sample.{n}": t for n, t in self._sample.items()} | {
            f"whole.{n}": t for n, t in self._whole.items()
        }
        return tensors if self._low is None or self._up is None else tensors | {"low": self._low, "up": self._up}

    def merge(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Hold what all `parts` recorded, as if this observer had seen all their batches."""
        self._sample = {int(k[7:]): t for part in parts for k, t in part.items() if k.startswith("sample.")}
        self._whole = {int(k[6:]): t for part in parts for k, t in part.items() if k.startswith("whole.")}
        lows, ups = ([part[k] for part in parts if k in part] for k in ("low", "up"))
        if lows:
            self._low, self._up = torch.stack(lows).amin(0), torch.stack(ups).amax(0)


class UniformQuantizer(nn.Module):
    """Fake-quantizes with a per-tensor or (last axis) per-channel scale. Buffers: `scale`, `zero_point`, float32."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        # as calibrated, in their own precision: the reparameterization starts from these
        self.exact = (scale.double(), zero_point.double())
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UniformQuantizer:
        self.exact = (fn(self.exact[0]), fn(self.exact[1]))  # follows the buffers to another device
        return super()._apply(fn, recurse)

    @property
    def axis(self) -> int | None:
        return -1 if self.scale.ndim else None

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes, in float."""
        return uniform.quantize(x, self.scale, self.zero_point, self.bits, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        return uniform.dequantize(self.codes(x), self.scale, self.zero_point, self.axis)


class LogQuantizer(nn.Module):
    """Fake-quantizes non-negative values on a logarithmic grid: `steps` codes per octave. Buffer: `scale`, float32,
    0-d.

    Attributes:
        normalized: whether its grid was chosen for rows that are divided by their sum before they are read; the
            division is none of its own (see `passes.normalize_rows`).
    """

    scale: Tensor

    def __init__(self, scale: float, bits: int, steps: int, *, normalized: bool = False) -> None:
        super().__init__()
        self.bits, self.steps, self.normalized = bits, steps, normalized
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return logarithmic.fake_quantize(x, float(self.scale), self.bits, self.steps)


class Passthrough(nn.Module):
    """An activation left in float on purpose."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ShiftLogQuantizer(LogQuantizer):
    """A logarithmic quantizer after scale reparameterization: the same codes and values, dequantized by a shift (Eq.
    16-17).
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.scale)
        return logarithmic.dequantize_shift(
            logarithmic.quantize(x, scale, self.bits, self.steps), scale, self.bits, self.steps
        )
