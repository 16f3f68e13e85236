"""Arrays against the inputs they feed: shape, dtype, range and finiteness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from repquant_fx.calibration.images import shape_text
from repquant_fx.calibration.inputs import Array, InputSpec
from repquant_fx.errors import CalibrationError

_LARGEST = 1e18


def check_array(array: Array, spec: InputSpec, where: str) -> None:
    """Check one array of samples, batch first, against an input: shape and dtype.

    Raises:
        CalibrationError: with what was expected and what was found.
    """
    shape = tuple(int(d) for d in array.shape)
    wanted = shape_text((None, *spec.shape[1:]))
    if len(shape) != len(spec.shape) or any(w not in (None, f) for w, f in zip(spec.shape[1:], shape[1:])):
        hint = ""
        if len(shape) + 1 == len(spec.shape):
            hint = "; the first dimension must be the batch"
        elif len(shape) == 4 and (shape[0], shape[3], shape[1], shape[2])[1:] == spec.shape[1:]:
            hint = "; the channels must come before height and width"
        raise CalibrationError(f"{where}: input {spec.name} expects shape {wanted}, found {shape_text(shape)}{hint}")
    if not shape:
        raise CalibrationError(f"{where}: input {spec.name} has no batch dimension")
    if spec.longest is not None and len(shape) > 1 and shape[1] > spec.longest:
        raise CalibrationError(
            f"{where}: input {spec.name} has sequences of {shape[1]} tokens, the model takes at most {spec.longest}"
        )
    if isinstance(array, Tensor) and array.layout != torch.strided:
        raise CalibrationError(f"{where}: input {spec.name} must be a dense tensor, found {array.layout}")
    _check_dtype(_dtype_of(array, where), spec, len(shape), where)



def _check_dtype(given: torch.dtype, spec: InputSpec, rank: int, where: str) -> None:
    """Floats feed floats, integers (and booleans) feed integers, booleans feed booleans."""
    wanted, name = spec.dtype, f"{where}: input {spec.name}"
    if wanted.is_floating_point:
        if given == torch.uint8 and rank == 4:
            raise CalibrationError(
                f"{name} expects {dtype_text(wanted)}, found uint8: these look like images that are not "
                "preprocessed; scale and normalise them as the model was trained, or give an image folder"
            )
        fits = given.is_floating_point
    elif wanted == torch.bool:
        fits = given == torch.bool
    elif wanted.is_complex:
        fits = given.is_complex
    else:
        fits = not (given.is_floating_point or given.is_complex)
    if not fits:
        raise CalibrationError(f"{name} expects dtype {dtype_text(wanted)}, found {dtype_text(given)}")



def to_rows(array: Array, rows: Sequence[int], spec: InputSpec, where: str) -> Tensor:
    """The samples at `rows` of a checked array, in the dtype of the input.

    Raises:
        CalibrationError: integers out of the range of the input's dtype.
    """
    index = np.asarray(rows, dtype=np.int64)
    if isinstance(array, np.ndarray):
        taken = to_tensor(array[index], where)
    else:
        taken = array.detach()[torch.from_numpy(index).to(array.device)].cpu()
    if (
        not (spec.dtype.is_floating_point or spec.dtype.is_complex or spec.dtype == torch.bool)
        and taken.dtype != torch.bool
    ):
        limits, values = torch.iinfo(spec.dtype), taken.to(torch.int64)
        if values.numel() and (int(values.min()) < limits.min or int(values.max()) > limits.max):
            raise CalibrationError(f"{where}: input {spec.name} has integers that do not fit {dtype_text(spec.dtype)}")
        if spec.below is not None and values.numel() and (int(values.min()) < 0 or int(values.max()) >= spec.below):
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise CalibrationError(
                f"{where}: input {spec.name} has the id {wrong}, the model's vocabulary ends at {spec.below - 1}; "
                "the ids come from another tokenizer"
            )
    return taken.to(spec.dtype).contiguous()



def check_finite(tensors: Iterable[Tensor], rows: Iterable[Sequence[int]], spec: InputSpec, where: str) -> None:
    """Check batches of a float input for NaN and infinite values; `rows` numbers the samples of each.

    Raises:
        CalibrationError: with how many values and which samples.
    """
    if not spec.dtype.is_floating_point:
        return
    counts: dict[int, int] = {}
    largest = 0.0
    for tensor, numbers in zip(tensors, rows, strict=True):
        bad = (~torch.isfinite(tensor)).unsqueeze(-1).flatten(1).sum(1).tolist()
        counts |= {number: count for number, count in zip(numbers, bad, strict=True) if count}
        largest = max(largest, float(tensor.abs().max()) if tensor.numel() else 0.0)
    if counts:
        samples = sorted(counts)
        named = ", ".join(map(str, samples[:5])) + (", ..." if len(samples) > 5 else "")
        raise CalibrationError(f"{where}: input {spec.name} has {sum(counts.values())} values that are NaN or infinite,"
                               f" in sample{'s' if len(samples) > 1 else ''} {named}")
    if largest > _LARGEST and "mask" not in spec.name.lower():  # a mask may hold the least number that there is
        raise CalibrationError(
            f"{where}: input {spec.name} has values up to {largest:.3g}, whose squares overflow float32; "
            "scale the data as the model was trained"
        )


def _dtype_of(array: Array, where: str) -> torch.dtype:
    if isinstance(array, Tensor):
        return array.dtype
    return to_tensor(array[:0] if array.ndim else array, where).dtype



def to_tensor(array: Array, where: str) -> Tensor:
    """A tensor on the CPU that shares no read-only memory; any byte order."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise CalibrationError(f"{where}: arrays of dtype {array.dtype} cannot be used") from error



def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
