"""Random inputs where there is no calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repquant_fx import limits
from repquant_fx.calibration.images import DEFAULT_SIDE
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import CalibrationError

DEFAULT_LENGTH = 16
_IDS = 16


def made_up(spec: InputSpec, samples: int, preprocessing: Mapping[str, Any] | None, generator: torch.Generator,
               length: int) -> Tensor:
    """Random samples of one input; free dimensions get the side of an image, or `length`; ids are spread over the
    vocabulary.
    """
    if not spec.shape:
        raise CalibrationError(f"input {spec.name} has no batch dimension, so no inputs can be made up for it")
    size: Sequence[int | None] = spec.shape[1:]
    if len(spec.shape) == 4 and spec.dtype.is_floating_point and None in size:
        stored = (preprocessing or {}).get("input_size") or (3, DEFAULT_SIDE, DEFAULT_SIDE)
        size = [own if own is not None else int(other) for own, other in zip(size, stored)]
    shape = [samples, *(d if d is not None else length for d in size)]
    limits.check_size(shape, f"made-up input {spec.name}", spec.dtype.itemsize)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool or "mask" in spec.name.lower():
        return torch.ones(shape, dtype=spec.dtype)
    if "type" in spec.name.lower():
        return torch.zeros(shape, dtype=spec.dtype)
    return torch.randint(0, spec.below or _IDS, shape, generator=generator).to(spec.dtype)
