"""Top-1 and top-5 accuracy of image classifiers.

Images are streamed: threads decode the next batches while the model runs, and nothing is kept.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from repquant_fx.calibration.arrays import read_arrays
from repquant_fx.calibration.checks import check_array, check_finite, to_rows
from repquant_fx.calibration.images import (
    ImageReader,
    Unreadable,
    find_images,
    image_size,
    read_ahead,
    stack,
    unreadable_error,
)
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.evaluation.runners import Runner, first_rows
from repquant_fx.progress import progress

Predict: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Result of an evaluation.

    Attributes:
        top1: percent of samples whose label has the largest output.
        top5: percent of samples whose label is among the five largest outputs (all of them, below five classes).
        samples: evaluated.
        classes: outputs of the model.
    """

    top1: float
    top5: float
    samples: int
    classes: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %  top-5 {self.top5:.2f} %  ({self.samples} images)"


@dataclass
class LabelledImages:
    """Images of class folders as batches; decoded anew at each iteration.

    Yields (images, labels): images (N, C, H, W) of `dtype`, labels (N,) int64.
    """

    files: list[tuple[Path, int]]
    classes: list[str]
    reader: ImageReader
    batch_size: int
    dtype: torch.dtype = torch.float32

    @property
    def samples(self) -> int:
        """Number of images."""
        return len(self.files)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode and batch.

        Raises:
            CalibrationError: images of the batch are unreadable; they are named.
        """
        rows = read_ahead(self.reader, (path for path, _ in self.files), ahead=max(16, min(2 * self.batch_size, 256)))
        for start in range(0, len(self.files), self.batch_size):
            part = self.files[start:start + self.batch_size]
            read = [next(rows) for _ in part]
            failures = [row for row in read if isinstance(row, Unreadable)]
            if failures:
                raise unreadable_error(failures)
            images = stack([row for row in read if isinstance(row, Tensor)], self.dtype)
            yield images, torch.tensor([label for _, label in part])


@dataclass
class LabelledArrays:
    """Preprocessed images and labels of a file, as batches (images, labels)."""

    images: Tensor | np.ndarray
    labels: Tensor
    chosen: list[int]
    spec: InputSpec
    where: str
    batch_size: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.chosen)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.chosen) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images in the dtype of the model's input and labels (N,) int64; raises CalibrationError on NaN."""
        for start in range(0, len(self.chosen), self.batch_size):
            rows = self.chosen[start:start + self.batch_size]
            images = to_rows(self.images, rows, self.spec, self.where)
            check_finite([images], [rows], self.spec, self.where)
            yield images, self.labels[rows]


def accuracy(runner: Runner, data: Path, *, batch_size: int = 64, limit: int | None = None, seed: int = 0) -> Accuracy:
    """Accuracy of a classifier on labelled images.

    Args:
        data: class folders of images (the sorted folder names are the labels), or a .npz or .safetensors with `images`
            (preprocessed, N x C x H x W) and `labels` (N integers).
        batch_size: images per batch; a model with a fixed batch overrides it.
        limit: evaluate a seeded random subset of this many samples.
        seed: of the subset.

    Raises:
        InputError: data and model do not fit together, or the model is no classifier.
    """
    if len(runner.inputs) != 1 or not runner.inputs[0].dtype.is_floating_point:
        takes = ", ".join(f"{spec.name} {spec.dtype}".replace("torch.", "") for spec in runner.inputs)
        raise InputError(f"accuracy is of image classifiers with one float input; {runner.source} takes {takes}")
    spec = runner.inputs[0]
    size = runner.limit(spec.name, batch_size)
    batches: LabelledImages | LabelledArrays
    folder_classes = None
    if data.is_dir():
        batches = labelled_folder(
            data,
            image_preprocessing(runner),
            image_size(spec.shape, runner.preprocessing),
            size,
            limit,
            seed,
            dtype=spec.dtype,
        )
        folder_classes = len(batches.classes)
    else:
        batches = _labelled_arrays(data, spec, size, limit, seed)

    def predict(images: Tensor) -> Tensor:
        outputs = runner({spec.name: images})
        if not outputs:
            raise InputError(f"{runner.source} gives no tensor")
        return first_rows(outputs.get("logits", next(iter(outputs.values()))), len(images))

    return accuracy_of(predict, progress(batches, len(batches), "evaluating"), folder_classes=folder_classes)


def image_preprocessing(runner: Runner) -> Mapping[str, Any] | None:
    """The model's own preprocessing; warns where there is none."""
    if not runner.preprocessing:
        warnings.warn(
            "the model carries no image preprocessing; using its input size with ImageNet mean and std",
            RepQuantWarning,
            stacklevel=3,
        )
    return runner.preprocessing


def accuracy_of(
    predict: Predict, images: Iterable[tuple[Tensor, Tensor]], *, folder_classes: int | None = None
) -> Accuracy:
    """Accuracy of a function on batches in memory or streamed.

    Args:
        predict: images (N, C, H, W) to outputs (N, classes).
        images: batches (images, labels); labels (N,) of an integer dtype, from 0.
        folder_classes: classes of the data where known; more than the model has outputs is an error at the first batch.

    Raises:
        InputError: no samples, outputs that are not (N, classes) or not finite, labels beyond the outputs.
    """
    first = fifth = samples = classes = 0
    for batch, labels in images:
        outputs = _checked_outputs(predict(batch), len(batch))
        classes = outputs.shape[1]
        _check_labels(labels, len(batch), classes, folder_classes)
        best = outputs.topk(min(5, classes), dim=1).indices == labels.to(outputs.device)[:, None]
        first += int(best[:, 0].sum())
        fifth += int(best.any(1).sum())
        samples += len(batch)
    if not samples:
        raise InputError("there are no samples to evaluate")
    return Accuracy(100.0 * first / samples, 100.0 * fifth / samples, samples, classes)


def labelled_folder(
    folder: str | Path, preprocessing: Mapping[str, Any] | None, input_size: int | Sequence[int], batch_size: int = 64,
    limit: int | None = None, seed: int = 0, *, dtype: torch.dtype = torch.float32,
) -> LabelledImages:
    """Class folders of images as a stream of batches.

    Args:
        folder: one folder per class; the index in the sorted names is the label.
        preprocessing: timm data config, or None for ImageNet mean and std.
        input_size: (C, H, W), or the side of a square RGB image.
        batch_size: images per batch; the last may be smaller.
        limit: a random subset of this many, in the order of the folder.
        seed: of the subset.
        dtype: of the images.

    Raises:
        InputError: not a folder, no class folders, no images, or an invalid size or preprocessing.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(
            f"evaluation data {root} is not a folder" if root.exists() else f"evaluation data {root} does not exist"
        )
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError("batch size and limit must be at least 1")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"no class folders in {root}: accuracy needs one folder of images for each class")
    files = [(path, label) for label, name in enumerate(classes) for path in find_images(root / name)]
    if not files:
        raise InputError(f"no images in the class folders of {root}")
    sizes = (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    reader = ImageReader(preprocessing, image_size((None, *sizes), preprocessing))
    return LabelledImages([files[i] for i in subset(len(files), limit, seed)], classes, reader, batch_size, dtype)


# ---- data ------------------------------------------------------------------------------------------------------------


def _labelled_arrays(path: Path, spec: InputSpec, batch_size: int, limit: int | None, seed: int) -> LabelledArrays:
    """`images` and `labels` of a file, checked against the model's input."""
    arrays = read_arrays(path) if path.suffix.lower() in (".npz", ".safetensors") else None
    if not isinstance(arrays, Mapping):
        raise InputError(f"evaluation data {path}: expected class folders of images, or a .npz or .safetensors")
    if not {"images", "labels"} <= arrays.keys():
        raise InputError(
            f"evaluation data {path} needs the arrays images and labels; found {', '.join(arrays) or 'none'}"
        )
    images, stored = arrays["images"], arrays["labels"]
    labels = (
        stored.double().numpy() if isinstance(stored, Tensor) and stored.is_floating_point() else np.asarray(stored)
    )
    check_array(images, spec, str(path))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise InputError(f"evaluation data {path}: labels must be {len(images)} integers, one per image; "
                         f"found {labels.dtype} of shape {labels.shape}")
    if not len(labels):
        raise InputError(f"evaluation data {path}: there are no samples to evaluate")
    numbers = torch.from_numpy(labels.astype(np.int64))
    return LabelledArrays(images, numbers, subset(len(labels), limit, seed), spec, str(path), batch_size)


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """All indices, or `limit` of them by the seed, ascending."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _checked_outputs(outputs: Any, count: int) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != count or outputs.shape[1] == 0:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"evaluate is for classifiers, whose output is (batch, classes); for a batch of {count} this model gave "
            f"{found}"
        )
    if not torch.isfinite(outputs).all():
        raise InputError("the model's outputs are NaN or infinite, so it has no accuracy")
    return outputs


def _check_labels(labels: Tensor, count: int, classes: int, folder_classes: int | None) -> None:
    if folder_classes is not None and folder_classes > classes:
        raise InputError(f"the data has {folder_classes} class folders, but the model has only {classes} outputs")
    if labels.shape != (count,):
        raise InputError(f"labels must be one integer an image: {count} images, labels of shape {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"labels go from {int(labels.min())} to {int(labels.max())}, "
                         f"but the model has outputs 0 to {classes - 1}")
