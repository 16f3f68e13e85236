"""Calibration data: an image folder, a file of arrays or text, user code or the model file, to checked batches in input
order.

Everything that goes in is checked against the model's inputs (`InputSpec`) before a pass sees it: number, shape, dtype,
finiteness. Samples are chosen by a seed, so the same call gives the same batches.
"""

from __future__ import annotations

import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from repquant_fx import limits
from repquant_fx.calibration.arrays import ARRAY_SUFFIXES, read_arrays
from repquant_fx.calibration.batching import Batch, CalibrationSet, plan_batches
from repquant_fx.calibration.callables import call, import_callable, naming_errors, working_directory_importable
from repquant_fx.calibration.checks import check_array, check_finite, dtype_text, to_rows, to_tensor
from repquant_fx.calibration.images import (
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
from repquant_fx.calibration.inputs import Array, InputSpec, in_order, is_mask, with_masks
from repquant_fx.calibration.synthetic import Synthesis, synthesise
from repquant_fx.calibration.text import TEXT_SUFFIXES, Tokenization, encode
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.errors import CalibrationError, RepQuantWarning
from repquant_fx.files import irregular
from repquant_fx.progress import progress

_MODULE_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_calibration(
    spec: str | Path | Callable[[], Any] | Array | Mapping[str, Array] | Iterable[Any] | None,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Mapping[str, Any] | None,
    samples: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    example_inputs: Sequence[Tensor] | None = None,
    text: Tokenization | None = None,
    model: Callable[..., Any] | None = None,
    cache: Checkpoint | None = None,
) -> CalibrationSet:
    """Load, check and batch calibration data.

    Args:
        spec: an image folder; a .npy, .npz, .pt or .safetensors file; a .txt or .jsonl; `module:callable`; a tensor,
            batches or a callable; or None for the example inputs of the model file and, failing those, synthesised
            inputs. A callable returns or yields a tensor, tuple or dict: all samples at once, or batches. Names are
            those of the inputs; a mask that is left out is ones.
        inputs: the model's inputs. A batch dimension that is not None fixes the batch size.
        preprocessing: timm data config of the model, used for image folders only.
        samples: how many to use at most. Of files and arrays a seeded random choice; of an iterator, the first.
        batch_size: samples per batch. The last batch may differ.
        seed: of the choice and the order.
        example_inputs: one tensor per input, batch first.
        text: how a .txt or .jsonl is read, and the length of sequences that are made up.
        model: takes the inputs in their order; what inputs are synthesised from.
        cache: where synthesised inputs are kept, and read again.

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
        if example_inputs:
            return loader.from_examples(example_inputs)
        return loader.synthesise(model, cache or Checkpoint())
    if isinstance(spec, (str, Path)):
        return loader.from_text(str(spec))
    if isinstance(spec, (Tensor, np.ndarray, Mapping)):
        return loader.from_arrays(spec, "tensors given by the caller")
    if callable(spec) and not hasattr(spec, "__iter__"):
        name = getattr(spec, "__qualname__", type(spec).__name__)
        return loader.from_value(call(spec, name), f"callable {name}")
    if hasattr(spec, "__iter__"):
        return loader.from_value(spec, "batches given by the caller")
    raise CalibrationError(
        f"calibration data of type {type(spec).__name__} cannot be used: give a path, module:callable, "
        "a tensor, batches or a callable"
    )


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
            raise CalibrationError(
                "the path of the calibration data is empty" if not text.strip() else f"{text!r} is no path"
            )
        if kind := irregular(path):
            raise CalibrationError(f"calibration data {path} is {kind}, not a file")
        if path.is_dir():
            return self.from_folder(path)
        if path.exists() and path.suffix.lower() in TEXT_SUFFIXES:
            return self.from_text_file(path)
        if path.exists():
            return self.from_arrays(read_arrays(path), str(path), ordered=path.suffix.lower() != ".safetensors")
        if _MODULE_CALLABLE.fullmatch(text):
            with working_directory_importable():
                return self.from_value(call(import_callable(text), text), f"callable {text}")
        raise CalibrationError(f"calibration data {text} does not exist: give an image folder, a file "
                               f"({', '.join(ARRAY_SUFFIXES + TEXT_SUFFIXES)}) or module:callable")

    def from_text_file(self, path: Path) -> CalibrationSet:
        """Text through the model's tokenizer."""
        ids = next((spec for spec in self.inputs if not is_mask(spec) and not spec.dtype.is_floating_point), None)
        if self.text is None or ids is None:
            raise CalibrationError(f"calibration text {path} feeds a model that takes token ids; this one takes "
                                   + ", ".join(f"{s.name} {dtype_text(s.dtype)}" for s in self.inputs))
        encoded = encode(path, self.text, self.samples, self.seed)
        if ids.name != "input_ids":
            encoded[ids.name] = encoded.pop("input_ids")
        return self.from_arrays(
            encoded, f"{path}, {'windows' if self.text.causal else 'lines'} of at most {self.text.length} tokens"
        )

    def from_folder(self, folder: Path) -> CalibrationSet:
        """Images, chosen and shuffled by the seed."""
        if len(self.inputs) != 1 or not self.inputs[0].dtype.is_floating_point:
            wanted = ", ".join(f"{s.name} {s.dtype}" for s in self.inputs)
            raise CalibrationError(f"a folder of images feeds a model with one float input; this one has: {wanted}")
        size = image_size(self.inputs[0].shape, self.preprocessing)
        files = find_images(folder)
        if not files:
            raise CalibrationError(
                f"no images in the folder {folder}" + ("" if any(folder.iterdir()) else ": it is empty")
            )
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
            raise CalibrationError(
                f"{origin} gave {type(value).__name__}: expected a tensor, a tuple, a dict or batches of them"
            )
        return self.from_arrays(self._gather(value, origin), origin)

    def _is_one_tuple(self, value: Any) -> bool:
        """Whether tensors side by side are the inputs of one batch. For a single input they are batches, unless a tuple
        of different ranks says that labels or the like came along."""
        if (
            not isinstance(value, (tuple, list))
            or not value
            or not all(isinstance(v, (Tensor, np.ndarray)) for v in value)
        ):
            return False
        if len(self.inputs) > 1 or len(value) == 1:
            return True
        return isinstance(value, tuple) and any(v.ndim != len(self.inputs[0].shape) for v in value)

    def _gather(self, batches: Iterable[Any], origin: str) -> list[Array]:
        """One array an input out of batches. An iterator is read no further than needed: it may be endless."""
        columns: list[list[Tensor]] = [[] for _ in self.inputs]
        enough = sys.maxsize if isinstance(batches, (list, tuple)) else self.samples
        count = 0
        for index, batch in enumerate(progress(naming_errors(batches, origin), description="reading batches")):
            where = f"{origin}, batch {index}"
            if isinstance(batches, DataLoader):
                batch = self._without_targets(batch)
            arrays = self._columns(batch, where)
            count += self._length(arrays, where)
            for column, array in zip(columns, arrays, strict=True):
                column.append(to_tensor(array, where))
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

    def synthesise(self, model: Callable[..., Any] | None, cache: Checkpoint) -> CalibrationSet:
        """Inputs made from the model, with a warning that says what they are."""
        how = Synthesis(self.inputs, model, self.preprocessing, self.text, self.batch_size, self.fixed, self.seed)
        made = synthesise(how, self.samples, cache)
        warnings.warn(
            f"no calibration data: {made.notes}; give an image folder, a file of arrays or text, or module:callable",
            RepQuantWarning,
            stacklevel=3,
        )
        origin = f"{made.origin} (no calibration data was given)"
        result = self._build(made.columns, range(len(made.columns[0])), origin)
        result.synthetic, result.notes = True, made.notes
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
            value = with_masks(value[0], self.inputs) or value
        if isinstance(value, Mapping):
            value = in_order(value, self.inputs, origin, ordered)
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
        # one sample, expanded, can claim any number
        limits.check_size((count,), f"{origin}: a permutation of the samples", itemsize=8)
        return count


def _join(parts: Sequence[Tensor], spec: InputSpec, origin: str) -> Tensor:
    shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
    if len(shapes) > 1:
        raise CalibrationError(
            f"{origin}: the batches of input {spec.name} differ in shape, "
            f"{shape_text((None, *shapes[0]))} and {shape_text((None, *shapes[1]))}; pad them to one shape"
        )
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
