"""What sits in the graph at a quantized activation: an observer while calibrating, a quantizer afterwards.

Both are modules that take the activation and return one of the same shape, so that a pass swaps one for the other under the
same name and the graph always runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repquant_fx.quantizers import logarithmic, uniform


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
        self._sample: list[Tensor] = []
        self._whole: list[Tensor] = []
        self._low: Tensor | None = None
        self._up: Tensor | None = None
        self._generator = torch.Generator().manual_seed(0)

    def start(self, batches: int) -> None:
        """Begin recording `batches` calls; the sample is shared out evenly over them."""
        self.recording, self.quota = True, max(1, -(-self.capacity // max(1, batches)))

    def forward(self, x: Tensor) -> Tensor:
        if self.recording:
            rows = x.detach().reshape(-1, x.shape[-1]) if self.channels else x.detach().reshape(-1, 1)
            low, up = rows.amin(dim=0), rows.amax(dim=0)
            self._low = low if self._low is None else torch.minimum(self._low, low)
            self._up = up if self._up is None else torch.maximum(self._up, up)
            if len(rows) > self.quota:
                chosen = torch.randint(len(rows), (self.quota,), generator=self._generator)
                rows = rows[chosen.to(rows.device)]
            self._sample.append(rows.clone())
            if self.leading > 0 and x.shape[0] > 0:
                self._whole.append(x.detach()[: self.leading].clone())
        return x

    def sample(self) -> Tensor:
        """The recorded sample as (D, N), with the exact extremes of all data appended; D is 1 when not per channel."""
        if self._low is None or self._up is None:
            raise RuntimeError("an observer has seen no data")
        return torch.cat([*self._sample, self._low[None], self._up[None]]).T.contiguous()

    def whole(self) -> Tensor:
        """The slices kept whole, concatenated along the first axis."""
        return torch.cat(self._whole)


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

    @property
    def axis(self) -> int | None:
        return -1 if self.scale.ndim else None

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes, in float."""
        return uniform.quantize(x, self.scale, self.zero_point, self.bits, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        return uniform.dequantize(self.codes(x), self.scale, self.zero_point, self.axis)


class LogQuantizer(nn.Module):
    """Fake-quantizes non-negative values on a logarithmic grid: `steps` codes an octave. Buffer: `scale`, float32, 0-d."""

    scale: Tensor

    def __init__(self, scale: float, bits: int, steps: int) -> None:
        super().__init__()
        self.bits, self.steps = bits, steps
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return logarithmic.fake_quantize(x, float(self.scale), self.bits, self.steps)


class Passthrough(nn.Module):
    """An activation left in float on purpose."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ShiftLogQuantizer(LogQuantizer):
    """A logarithmic quantizer after scale reparameterization: the same codes and values, dequantized by a shift (Eq. 16-17)."""

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.scale)
        return logarithmic.dequantize_shift(logarithmic.quantize(x, scale, self.bits, self.steps), scale, self.bits, self.steps)
