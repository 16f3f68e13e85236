"""Calibration data: an image folder, a file of arrays or text, user code or the model file, to checked batches in input order.

Everything that goes in is checked against the model's inputs (`InputSpec`) before a pass sees it: number, shape, dtype,
finiteness. Samples are chosen by a seed, so the same call gives the same batches.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from repquant_fx import limits
from repquant_fx.calibration.images import (
    DEFAULT_SIDE,
    ImageReader,
    Unreadable,
    describe_preprocessing,
    find_images,
    image_size,
    read_ahead,
    shape_text,
    stack,
    unreadable_error,
)
from repquant_fx.calibration.text import TEXT_SUFFIXES, Tokenization, encode
from repquant_fx.errors import CalibrationError, RepQuantWarning
from repquant_fx.files import irregular
from repquant_fx.frontends.pickled import check_pickle, first_line
from repquant_fx.progress import progress

Array: TypeAlias = Tensor | np.ndarray
Batch: TypeAlias = tuple[Tensor, ...]

ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
_MODULE_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "y"})
_IMAGE_NAMES = frozenset({"image", "images", "input", "inputs", "x"})
_SYNTHETIC_LENGTH = 16
_LARGEST = 1e18
_SYNTHETIC_IDS = 16


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


@dataclass
class CalibrationSet:
    """Checked calibration batches.

    Attributes:
        batches: one tuple of tensors a batch, in the order of the model's inputs; dimension 0 is the batch in all.
        origin: where they came from, for reports.
        synthetic: whether they were made up.
        batch_size: wanted size; 0 stands for that of the first batch.
        fixed_batch: the model takes batches of `batch_size` only.
    """

    batches: list[Batch]
    origin: str
    synthetic: bool
    batch_size: int = 0
    fixed_batch: bool = False

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(_batch_length(batch) for batch in self.batches)

    def split_held_back(self, n: int) -> tuple[CalibrationSet, CalibrationSet]:
        """The set to calibrate with, and the last samples held back to judge by.

        `n` samples are held back, or a quarter of the set where that is less, but one at least. A set of a single sample
        is used for both. With a fixed batch, whole batches move.

        Raises:
            CalibrationError: n < 1, or the set is empty.
        """
        if n < 1:
            raise CalibrationError(f"at least 1 sample must be held back, not {n}")
        if not self.batches:
            raise CalibrationError("the calibration set is empty")
        unit = _batch_length(self.batches[0]) if self.fixed_batch else 1
        units = self.samples // unit
        if units < 2:
            return self, self
        start = unit * (units - min(-(-n // unit), max(1, units // 4)))
        return self._part(0, start), self._part(start, self.samples)

    def _part(self, start: int, stop: int) -> CalibrationSet:
        size = self.batch_size or _batch_length(self.batches[0])
        bounds = [0]
        for length in batch_sizes(stop - start, size):
            bounds.append(bounds[-1] + length)
        batches = [_slice(self.batches, start + a, start + b) for a, b in pairwise(bounds)]
        return CalibrationSet(batches, self.origin, self.synthetic, size, self.fixed_batch)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Sizes of the batches for `count` samples: all `batch_size` but the last.

    A last batch of one sample is folded into the one before: some dynamic graphs want two samples at least.

    >>> batch_sizes(10, 4), batch_sizes(9, 4)
    ([4, 4, 2], [4, 5])
    """
    full, rest = divmod(count, batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes


def plan_batches(order: Sequence[int], batch_size: int, fixed: bool = False) -> list[list[int]]:
    """Sample indices of each batch, in order.

    With a fixed batch all have exactly `batch_size`: the rest is dropped, or, when there is less than one batch, the samples
    are repeated to fill it.
    """
    indices = list(order)
    if fixed:
        if indices and len(indices) < batch_size:
            indices = (indices * -(-batch_size // len(indices)))[:batch_size]
        indices = indices[:len(indices) // batch_size * batch_size]
    batches, start = [], 0
    for size in batch_sizes(len(indices), batch_size):
        batches.append(indices[start:start + size])
        start += size
    return batches


def load_calibration(
    spec: str | Path | Callable[[], Any] | Array | Mapping[str, Array] | Iterable[Any] | None, inputs: Sequence[InputSpec], *,
    preprocessing: Mapping[str, Any] | None, samples: int = 1024, batch_size: int = 32, seed: int = 0,
    example_inputs: Sequence[Tensor] | None = None, text: Tokenization | None = None,
) -> CalibrationSet:
    """Load, check and batch calibration data.

    Args:
        spec: an image folder; a .npy, .npz, .pt or .safetensors file; a .txt or .jsonl; `module:callable`; a tensor, batches or a callable; or
            None for the example inputs of the model file and, failing those, synthesised inputs. A callable returns or yields
            a tensor, tuple or dict: all samples at once, or batches. Names are those of the inputs; a mask that is left out is ones.
        inputs: the model's inputs. A batch dimension that is not None fixes the batch size.
        preprocessing: timm data config of the model, used for image folders only.
        samples: how many to use at most. Of files and arrays a seeded random choice; of an iterator, the first.
        batch_size: samples a batch. The last batch may differ.
        seed: of the choice and the order.
        example_inputs: one tensor an input, batch first.
        text: how a .txt or .jsonl is read, and the length of sequences that are made up.

    Returns:
        Batches with the shapes and dtypes of `inputs`; float tensors are finite.

    Raises:
        CalibrationError: the data is missing, unreadable, or does not fit the model's inputs.
    """
    if samples < 1 or batch_size < 1:
        what, value = ("samples", samples) if samples < 1 else ("batch size", batch_size)
        raise CalibrationError(f"calibration: {what} must be at least 1, not {value}")
    if not inputs:
        raise CalibrationError("the model has no inputs to calibrate with")
    own = next((s.shape[0] for s in inputs if s.shape and s.shape[0] is not None), None)
    loader = _Loader(list(inputs), preprocessing or None, samples, own or batch_size, bool(own), seed, text)
    if spec is None:
        return loader.from_examples(example_inputs) if example_inputs else loader.synthesise()
    if isinstance(spec, (str, Path)):
        return loader.from_text(str(spec))
    if isinstance(spec, (Tensor, np.ndarray, Mapping)):
        return loader.from_arrays(spec, "tensors given by the caller")
    if callable(spec) and not hasattr(spec, "__iter__"):
        name = getattr(spec, "__qualname__", type(spec).__name__)
        return loader.from_value(_call(spec, name), f"callable {name}")
    if hasattr(spec, "__iter__"):
        return loader.from_value(spec, "batches given by the caller")
    raise CalibrationError(f"calibration data of type {type(spec).__name__} cannot be used: give a path, module:callable, "
                           "a tensor, batches or a callable")


@dataclass
class _Loader:
    """One call of `load_calibration`: the options, and a method for each form of data."""

    inputs: list[InputSpec]
    preprocessing: Mapping[str, Any] | None
    samples: int
    batch_size: int
    fixed: bool
    seed: int
    text: Tokenization | None = None

    def from_text(self, text: str) -> CalibrationSet:
        path = Path(text).expanduser()
        if not text.strip() or "\0" in text:
            raise CalibrationError("the path of the calibration data is empty" if not text.strip() else f"{text!r} is no path")
        if kind := irregular(path):
            raise CalibrationError(f"calibration data {path} is {kind}, not a file")
        if path.is_dir():
            return self.from_folder(path)
        if path.exists() and path.suffix.lower() in TEXT_SUFFIXES:
            return self.from_text_file(path)
        if path.exists():
            return self.from_arrays(read_arrays(path), str(path), ordered=path.suffix.lower() != ".safetensors")
        if _MODULE_CALLABLE.fullmatch(text):
            with _working_directory_importable():
                return self.from_value(_call(_import(text), text), f"callable {text}")
        raise CalibrationError(f"calibration data {text} does not exist: give an image folder, a file "
                               f"({', '.join(ARRAY_SUFFIXES + TEXT_SUFFIXES)}) or module:callable")

    def from_text_file(self, path: Path) -> CalibrationSet:
        """Text through the model's tokenizer."""
        ids = next((spec for spec in self.inputs if not _is_mask(spec) and not spec.dtype.is_floating_point), None)
        if self.text is None or ids is None:
            raise CalibrationError(f"calibration text {path} feeds a model that takes token ids; this one takes "
                                   + ", ".join(f"{s.name} {_dtype_text(s.dtype)}" for s in self.inputs))
        encoded = encode(path, self.text, self.samples, self.seed)
        if ids.name != "input_ids":
            encoded[ids.name] = encoded.pop("input_ids")
        return self.from_arrays(encoded, f"{path}, {'windows' if self.text.causal else 'lines'} of at most {self.text.length} tokens")

    def from_folder(self, folder: Path) -> CalibrationSet:
        """Images, chosen and shuffled by the seed."""
        if len(self.inputs) != 1 or not self.inputs[0].dtype.is_floating_point:
            wanted = ", ".join(f"{s.name} {s.dtype}" for s in self.inputs)
            raise CalibrationError(f"a folder of images feeds a model with one float input; this one has: {wanted}")
        size = image_size(self.inputs[0].shape, self.preprocessing)
        files = find_images(folder)
        if not files:
            raise CalibrationError(f"no images in the folder {folder}" + ("" if any(folder.iterdir()) else ": it is empty"))
        reader = ImageReader(self.preprocessing, size)
        random.Random(self.seed).shuffle(files)
        plan = plan_batches(range(min(self.samples, len(files))), self.batch_size, self.fixed)
        chosen = [files[i] for batch in plan for i in batch]
        rows: list[Tensor] = []
        failures: list[Unreadable] = []
        batches: list[Batch] = []
        for row in progress(read_ahead(reader, chosen), len(chosen), "reading images"):
            if isinstance(row, Unreadable):
                failures.append(row)
            elif not failures:
                rows.append(row)
                if len(rows) == len(plan[len(batches)]):
                    batches.append((stack(rows, self.inputs[0].dtype),))
                    rows = []
        if failures:
            raise unreadable_error(list(dict.fromkeys(failures)))
        origin = f"{len(set(chosen))} images of {folder}, {describe_preprocessing(self.preprocessing, size)}"
        return CalibrationSet(batches, origin, False, self.batch_size, self.fixed)

    def from_value(self, value: Any, origin: str) -> CalibrationSet:
        """What a callable returned: all samples at once, or batches."""
        if isinstance(value, (Tensor, np.ndarray, Mapping)) or self._is_one_tuple(value):
            return self.from_arrays(value, origin)
        if not hasattr(value, "__iter__") or isinstance(value, (str, bytes)):
            raise CalibrationError(f"{origin} gave {type(value).__name__}: expected a tensor, a tuple, a dict or batches of them")
        return self.from_arrays(self._gather(value, origin), origin)

    def _is_one_tuple(self, value: Any) -> bool:
        """Whether tensors side by side are the inputs of one batch. For a single input they are batches, unless a tuple of
        different ranks says that labels or the like came along."""
        if not isinstance(value, (tuple, list)) or not value or not all(isinstance(v, (Tensor, np.ndarray)) for v in value):
            return False
        if len(self.inputs) > 1 or len(value) == 1:
            return True
        return isinstance(value, tuple) and any(v.ndim != len(self.inputs[0].shape) for v in value)

    def _gather(self, batches: Iterable[Any], origin: str) -> list[Array]:
        """One array an input out of batches. An iterator is read no further than needed: it may be endless."""
        columns: list[list[Tensor]] = [[] for _ in self.inputs]
        enough = sys.maxsize if isinstance(batches, (list, tuple)) else self.samples
        count = 0
        for index, batch in enumerate(progress(_guarded(batches, origin), description="reading batches")):
            where = f"{origin}, batch {index}"
            if isinstance(batches, DataLoader):
                batch = self._without_targets(batch)
            arrays = self._columns(batch, where)
            count += self._length(arrays, where)
            for column, array in zip(columns, arrays, strict=True):
                column.append(_to_tensor(array, where))
            if count >= enough:
                break
        if not columns[0]:
            raise CalibrationError(f"{origin} gave no batches")
        return [_join(column, spec, origin) for column, spec in zip(columns, self.inputs, strict=True)]

    def _without_targets(self, batch: Any) -> Any:
        """A DataLoader's batch without the labels that follow the inputs."""
        if isinstance(batch, (tuple, list)) and len(batch) > len(self.inputs):
            batch = batch[:len(self.inputs)]
            return batch[0] if isinstance(batch[0], Mapping) else tuple(batch)
        return batch

    def from_arrays(self, value: Any, origin: str, *, ordered: bool = True) -> CalibrationSet:
        """Arrays of all samples: check, choose by the seed, convert."""
        columns = self._columns(value, origin, ordered)
        count = self._length(columns, origin)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return self._build(columns, order[:self.samples], origin)

    def from_examples(self, example_inputs: Sequence[Tensor]) -> CalibrationSet:
        origin = "example inputs stored in the model file"
        columns = self._columns(tuple(example_inputs), origin)
        return self._build(columns, range(min(self.samples, self._length(columns, origin))), origin)

    def synthesise(self) -> CalibrationSet:
        """Made-up inputs: standard normal, or small integers; masks are all ones."""
        warnings.warn("no calibration data: the ranges come from random inputs, and accuracy will suffer; "
                      "give an image folder, a file of arrays or text, or module:callable", RepQuantWarning, stacklevel=3)
        generator = torch.Generator().manual_seed(self.seed)
        length = self.text.length if self.text is not None else _SYNTHETIC_LENGTH
        columns = [_synthetic(spec, self.samples, self.preprocessing, generator, length) for spec in self.inputs]
        result = self._build(columns, range(self.samples), "random inputs (no calibration data was given)")
        result.synthetic = True
        return result

    def _build(self, columns: Sequence[Array], order: Sequence[int], origin: str) -> CalibrationSet:
        plan = plan_batches(order, self.batch_size, self.fixed)
        batches = [tuple(to_rows(column, rows, spec, origin) for column, spec in zip(columns, self.inputs, strict=True))
                   for rows in plan]
        for position, spec in enumerate(self.inputs):
            check_finite((batch[position] for batch in batches), plan, spec, origin)
        return CalibrationSet(batches, origin, False, self.batch_size, self.fixed)

    def _columns(self, value: Any, origin: str, ordered: bool = True) -> list[Array]:
        """The arrays of one value in the order of the inputs, shapes and dtypes checked."""
        if isinstance(value, (Tensor, np.ndarray)):
            value = (value,)
        if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], (Tensor, np.ndarray)):
            value = _with_masks(value[0], self.inputs) or value
        if isinstance(value, Mapping):
            value = _by_name(value, self.inputs, origin, ordered)
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, (Tensor, np.ndarray)) for v in value):
            kind = f"{type(value).__name__} of {', '.join(sorted({type(v).__name__ for v in value}))}" \
                if isinstance(value, (tuple, list)) else type(value).__name__
            raise CalibrationError(f"{origin}: expected a tensor, or a tuple or dict of tensors, found {kind}")
        if len(value) != len(self.inputs):
            hint = "; leave labels out" if len(value) > len(self.inputs) else ""
            raise CalibrationError(f"{origin}: {len(value)} tensors for {len(self.inputs)} inputs "
                                   f"({', '.join(s.name for s in self.inputs)}){hint}")
        for array, spec in zip(value, self.inputs, strict=True):
            check_array(array, spec, origin)
        return list(value)

    def _length(self, columns: Sequence[Array], origin: str) -> int:
        """Number of samples, which all inputs must share."""
        lengths = {spec.name: int(column.shape[0]) for spec, column in zip(self.inputs, columns, strict=True)}
        if len(set(lengths.values())) > 1:
            raise CalibrationError(f"{origin}: the inputs have different numbers of samples: "
                                   + ", ".join(f"{name} {length}" for name, length in lengths.items()))
        count = next(iter(lengths.values()))
        if count == 0:
            raise CalibrationError(f"{origin}: no samples")
        limits.check_size((count,), f"{origin}: a permutation of the samples", itemsize=8)  # one sample, expanded, can claim any number
        return count


# ---- arrays ---------------------------------------------------------------------------------------------------------------


def read_arrays(path: Path) -> Array | tuple[Array, ...] | dict[str, Array]:
    """The arrays of a .npy (memory-mapped), .npz, .pt or .safetensors file. No code of the file is executed.

    Raises:
        CalibrationError: unknown suffix, damaged file, objects that are no arrays.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise CalibrationError(f"calibration data {path}: unknown suffix {suffix or '(none)'!r}; an image folder, or one of "
                               f"{', '.join(ARRAY_SUFFIXES)} is needed")
    try:
        if suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an archive of arrays; call it .npz")
            return np.asarray(array)
        if (declared := limits.unpacks_to(path)) is not None:
            raise CalibrationError(f"calibration data {path} has {path.stat().st_size} bytes but would unpack to {declared}")
        if suffix == ".npz":
            _check_archive(path)
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise ValueError("it holds other files than arrays")  # numpy gives their bytes
            return found
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        data = path.read_bytes()
        check_pickle(data, str(path))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"calibration data {path} cannot be read as plain arrays "
                               f"(pickled objects are refused): {first_line(error)}") from error
    return tuple(loaded) if isinstance(loaded, list) else loaded


def _check_archive(path: Path) -> None:
    """The arrays of an archive are all read: together they must fit."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > limits.memory() // 4:
        raise CalibrationError(f"calibration data {path} would unpack to {limits.readable(declared)}, more than a quarter "
                               f"of the {limits.readable(limits.memory())} of this machine; give .npy, which stay on disk")


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
        raise CalibrationError(f"{where}: input {spec.name} has sequences of {shape[1]} tokens, the model takes at most {spec.longest}")
    if isinstance(array, Tensor) and array.layout != torch.strided:
        raise CalibrationError(f"{where}: input {spec.name} must be a dense tensor, found {array.layout}")
    _check_dtype(_dtype_of(array, where), spec, len(shape), where)


def _check_dtype(found: torch.dtype, spec: InputSpec, rank: int, where: str) -> None:
    """Floats feed floats, integers (and booleans) feed integers, booleans feed booleans."""
    wanted, name = spec.dtype, f"{where}: input {spec.name}"
    if wanted.is_floating_point:
        if found == torch.uint8 and rank == 4:
            raise CalibrationError(f"{name} expects {_dtype_text(wanted)}, found uint8: these look like images that are not "
                                   "preprocessed; scale and normalise them as the model was trained, or give an image folder")
        fits = found.is_floating_point
    elif wanted == torch.bool:
        fits = found == torch.bool
    elif wanted.is_complex:
        fits = found.is_complex
    else:
        fits = not (found.is_floating_point or found.is_complex)
    if not fits:
        raise CalibrationError(f"{name} expects dtype {_dtype_text(wanted)}, found {_dtype_text(found)}")


def to_rows(array: Array, rows: Sequence[int], spec: InputSpec, where: str) -> Tensor:
    """The samples at `rows` of a checked array, in the dtype of the input.

    Raises:
        CalibrationError: integers out of the range of the input's dtype.
    """
    index = np.asarray(rows, dtype=np.int64)
    if isinstance(array, np.ndarray):
        taken = _to_tensor(array[index], where)
    else:
        taken = array.detach()[torch.from_numpy(index).to(array.device)].cpu()
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex or spec.dtype == torch.bool) and taken.dtype != torch.bool:
        limits, values = torch.iinfo(spec.dtype), taken.to(torch.int64)
        if values.numel() and (int(values.min()) < limits.min or int(values.max()) > limits.max):
            raise CalibrationError(f"{where}: input {spec.name} has integers that do not fit {_dtype_text(spec.dtype)}")
        if spec.below is not None and values.numel() and (int(values.min()) < 0 or int(values.max()) >= spec.below):
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise CalibrationError(f"{where}: input {spec.name} has the id {wrong}, the model's vocabulary ends at {spec.below - 1}; "
                                   "the ids come from another tokenizer")
    return taken.to(spec.dtype).contiguous()


def check_finite(tensors: Iterable[Tensor], rows: Iterable[Sequence[int]], spec: InputSpec, where: str) -> None:
    """Check batches of a float input for NaN and infinite values; `rows` numbers the samples of each.

    Raises:
        CalibrationError: with how many values and which samples.
    """
    if not spec.dtype.is_floating_point:
        return
    found: dict[int, int] = {}
    largest = 0.0
    for tensor, numbers in zip(tensors, rows, strict=True):
        bad = (~torch.isfinite(tensor)).unsqueeze(-1).flatten(1).sum(1).tolist()
        found |= {number: count for number, count in zip(numbers, bad, strict=True) if count}
        largest = max(largest, float(tensor.abs().max()) if tensor.numel() else 0.0)
    if found:
        samples = sorted(found)
        named = ", ".join(map(str, samples[:5])) + (", ..." if len(samples) > 5 else "")
        raise CalibrationError(f"{where}: input {spec.name} has {sum(found.values())} values that are NaN or infinite, "
                               f"in sample{'s' if len(samples) > 1 else ''} {named}")
    if largest > _LARGEST and "mask" not in spec.name.lower():  # a mask may hold the least number that there is
        raise CalibrationError(f"{where}: input {spec.name} has values up to {largest:.3g}, whose squares overflow float32; "
                               "scale the data as the model was trained")


def _dtype_of(array: Array, where: str) -> torch.dtype:
    if isinstance(array, Tensor):
        return array.dtype
    return _to_tensor(array[:0] if array.ndim else array, where).dtype


def _to_tensor(array: Array, where: str) -> Tensor:
    """A tensor on the CPU that shares no read-only memory; any byte order."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise CalibrationError(f"{where}: arrays of dtype {array.dtype} cannot be used") from error


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_name(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], origin: str, ordered: bool) -> tuple[Any, ...]:
    """Arrays in the order of the inputs: by name, else in the order given, labels left out. A mask that is missing is ones."""
    names = [spec.name for spec in inputs]
    required = [spec.name for spec in inputs if not _is_mask(spec)]
    if not any("mask" in str(name).lower() and name not in names for name in arrays):
        if len(required) == 1 and len(arrays) == 1:
            return _with_masks(next(iter(arrays.values())), inputs) or tuple(arrays.values())
        if all(name in arrays for name in required):
            first = next((arrays[s.name] for s in inputs if s.name in required and not s.dtype.is_floating_point), None)
            arrays = {**arrays, **{name: _ones(first) for name in names if name not in arrays and first is not None}}
    if all(name in arrays for name in names):
        return tuple(arrays[name] for name in names)
    rest = {name: array for name, array in arrays.items() if str(name).lower() not in _LABEL_NAMES} or dict(arrays)
    if len(names) == 1 and len(rest) > 1:
        rest = {name: array for name, array in rest.items() if str(name).lower() in _IMAGE_NAMES} or rest
    some = [name for name in names if name in arrays]
    if len(required) < len(names) and not all(re.fullmatch(r"arr_\d+", str(name)) for name in rest):
        ordered = False  # ids and masks look alike: foreign names do not tell which is which
    if some or (len(names) > 1 and (not ordered or len(rest) != len(names))):
        missing = [name for name in names if name not in arrays]
        raise CalibrationError(f"{origin}: no array for the inputs {', '.join(missing)}; found {', '.join(map(str, arrays))}")
    return tuple(rest.values())


def _is_mask(spec: InputSpec) -> bool:
    return "mask" in spec.name.lower() and not spec.dtype.is_floating_point


def _with_masks(array: Array, inputs: Sequence[InputSpec]) -> tuple[Array, ...] | None:
    """Ids, and masks of ones beside them; None where the model takes more than ids and masks."""
    if len(inputs) == 1 or sum(not _is_mask(spec) for spec in inputs) != 1:
        return None
    return tuple(_ones(array) if _is_mask(spec) else array for spec in inputs)


def _ones(array: Array) -> Array:
    return torch.ones(tuple(array.shape), dtype=torch.int64)


def _join(parts: Sequence[Tensor], spec: InputSpec, origin: str) -> Tensor:
    shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
    if len(shapes) > 1:
        raise CalibrationError(f"{origin}: the batches of input {spec.name} differ in shape, "
                               f"{shape_text((None, *shapes[0]))} and {shape_text((None, *shapes[1]))}; pad them to one shape")
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _batch_length(batch: Batch) -> int:
    return int(batch[0].shape[0])


def _slice(batches: Sequence[Batch], start: int, stop: int) -> Batch:
    """Samples start to stop, counted through all batches; a view where they lie in one batch."""
    pieces, offset = [], 0
    for batch in batches:
        length = _batch_length(batch)
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            pieces.append(tuple(tensor[first:last] for tensor in batch))
        offset += length
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))


# ---- user code, made-up data ----------------------------------------------------------------------------------------------


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """The current directory first on sys.path, while user code is imported and runs."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(here)


def _import(text: str) -> Callable[[], Any]:
    """The callable `module:attribute` names; the attribute may be dotted."""
    module_name, _, attribute = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise CalibrationError(f"calibration callable {text}: there is no module {missing} on the path "
                                   f"or in {os.getcwd()}") from error
        raise CalibrationError(f"calibration callable {text}: importing {module_name} raised {_described(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CalibrationError(f"calibration callable {text}: the module {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise CalibrationError(f"calibration callable {text}: {attribute} is a {type(found).__name__}, not callable")
    return found


def _call(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise CalibrationError(f"calibration callable {name} raised {_described(error)}") from error


def _guarded(batches: Iterable[Any], origin: str) -> Iterator[Any]:
    """The batches; what the user's code raises on the way is named."""
    try:
        yield from batches
    except Exception as error:
        raise CalibrationError(f"{origin} raised {_described(error)}") from error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _synthetic(spec: InputSpec, samples: int, preprocessing: Mapping[str, Any] | None, generator: torch.Generator,
               length: int) -> Tensor:
    """Random samples of one input; free dimensions get the side of an image, or `length`; ids are spread over the vocabulary."""
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
    return torch.randint(0, spec.below or _SYNTHETIC_IDS, shape, generator=generator).to(spec.dtype)
