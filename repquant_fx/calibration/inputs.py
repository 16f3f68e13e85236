"""What a model takes, and which of the arrays that were given goes to which of its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from repquant_fx.errors import CalibrationError

Array: TypeAlias = Tensor | np.ndarray

_LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "y"})
_IMAGE_NAMES = frozenset({"image", "images", "input", "inputs", "x"})


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the forward argument or the graph input.
        shape: batch first; None where the dimension is free.
        dtype: what the model wants.
        below: integers must lie in [0, below), a vocabulary; None where any will do.
        longest: the largest size of dimension 1 that the model was built for, in tokens; None where it has no limit.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    below: int | None = None
    longest: int | None = None



def in_order(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], origin: str, ordered: bool) -> tuple[Any, ...]:
    """Arrays in the order of the inputs: by name, else in the order given, labels left out. A mask that is missing is
    ones. Only those that are wanted are fetched.
    """
    names = [spec.name for spec in inputs]
    required = [spec.name for spec in inputs if not is_mask(spec)]
    if not any("mask" in str(name).lower() and name not in names for name in arrays):
        if len(required) == 1 and len(arrays) == 1:
            return with_masks(next(iter(arrays.values())), inputs) or tuple(arrays.values())
        whole = next((spec.name for spec in inputs if spec.name in required and not spec.dtype.is_floating_point), None)
        if whole is not None and all(name in arrays for name in required):
            given = {name: arrays[name] for name in names if name in arrays}
            return tuple(given[name] if name in given else _ones(given[whole]) for name in names)
    if all(name in arrays for name in names):
        return tuple(arrays[name] for name in names)
    rest = [name for name in arrays if str(name).lower() not in _LABEL_NAMES] or list(arrays)
    if len(names) == 1 and len(rest) > 1:
        rest = [name for name in rest if str(name).lower() in _IMAGE_NAMES] or rest
    some = [name for name in names if name in arrays]
    if len(required) < len(names) and not all(re.fullmatch(r"arr_\d+", str(name)) for name in rest):
        ordered = False  # ids and masks look alike: foreign names do not tell which is which
    if some or (len(names) > 1 and (not ordered or len(rest) != len(names))):
        missing = [name for name in names if name not in arrays]
        raise CalibrationError(
            f"{origin}: no array for the inputs {', '.join(missing)}; found {', '.join(map(str, arrays))}"
        )
    return tuple(arrays[name] for name in rest)


def is_mask(spec: InputSpec) -> bool:
    return "mask" in spec.name.lower() and not spec.dtype.is_floating_point



def with_masks(array: Array, inputs: Sequence[InputSpec]) -> tuple[Array, ...] | None:
    """Ids, and masks of ones beside them; None where the model takes more than ids and masks."""
    if len(inputs) == 1 or sum(not is_mask(spec) for spec in inputs) != 1:
        return None
    return tuple(_ones(array) if is_mask(spec) else array for spec in inputs)



def _ones(array: Array) -> Array:
    return torch.ones(tuple(array.shape), dtype=torch.int64)
