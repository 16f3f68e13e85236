"""Top-1 and top-5 accuracy of image classifiers: float models in torch, quantized and other ONNX files in ONNX Runtime.

Images are streamed: threads decode the next batches while the model runs, and nothing is kept.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from repquant_fx.calibration.data import InputSpec, check_array, check_finite, read_arrays, to_rows
from repquant_fx.calibration.images import ImageReader, Unreadable, find_images, image_size, read_ahead, stack, unreadable_error
from repquant_fx.errors import InputError, ModelFileError, RepQuantWarning
from repquant_fx.progress import progress

Predict: TypeAlias = Callable[[Tensor], Tensor]
PREPROCESSING_KEY = "repquant_fx.preprocessing"
_ONNX_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


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


@dataclass
class _Classifier:
    """What evaluation needs of a model: its image input, its preprocessing, and a function from images to outputs."""

    predict: Predict
    spec: InputSpec
    preprocessing: Mapping[str, Any] | None


def evaluate(
    source: str, data: str, *, arch: str | None = None, allow_pickle: bool = False, batch_size: int = 64,
    limit: int | None = None, threads: int | None = None, seed: int = 0,
) -> Accuracy:
    """Accuracy of a classifier on labelled images.

    Args:
        source: an ONNX file, run by ONNX Runtime; or anything `load_model` takes, run by torch.
        data: class folders of images (the sorted folder names are the labels), or a .npz or .safetensors with `images`
            (preprocessed, N x C x H x W) and `labels` (N integers).
        arch: architecture of a bare state dict.
        allow_pickle: the user trusts the file of `source`; it may execute code.
        batch_size: images a batch; a model with a fixed batch overrides it.
        limit: evaluate a seeded random subset of this many samples.
        threads: of the runtime; None leaves the choice to it.
        seed: of the subset.

    Raises:
        InputError: data or model cannot be used, do not fit together, or the model is no classifier.
    """
    if batch_size < 1 or (limit is not None and limit < 1) or (threads is not None and threads < 1):
        raise InputError("batch size, limit and threads must be at least 1")
    if Path(source).suffix.lower() == ".onnx":
        return _measure(_onnx_classifier(source, threads), data, batch_size, limit, seed)
    with _torch_threads(threads):
        return _measure(_torch_classifier(source, arch, allow_pickle), data, batch_size, limit, seed)


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
        folder: one folder a class; the index in the sorted names is the label.
        preprocessing: timm data config, or None for ImageNet mean and std.
        input_size: (C, H, W), or the side of a square RGB image.
        batch_size: images a batch; the last may be smaller.
        limit: a random subset of this many, in the order of the folder.
        seed: of the subset.
        dtype: of the images.

    Raises:
        InputError: not a folder, no class folders, no images, or an invalid size or preprocessing.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"evaluation data {root} is not a folder" if root.exists() else f"evaluation data {root} does not exist")
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
    return LabelledImages([files[i] for i in _subset(len(files), limit, seed)], classes, reader, batch_size, dtype)


def preprocessing_from_onnx(path: str | Path) -> dict[str, Any] | None:
    """The timm data config stored in an ONNX file's metadata, or None.

    Raises:
        ModelFileError: the file is missing or no ONNX model.
        InputError: the stored text is not a JSON object.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelFileError(f"model file {path} does not exist") from error
    except Exception as error:
        raise ModelFileError(f"{path} cannot be read as an ONNX model: {type(error).__name__}: {error}") from error
    stored = next((entry.value for entry in model.metadata_props if entry.key == PREPROCESSING_KEY), None)
    if stored is None:
        return None
    try:
        config = json.loads(stored)
    except ValueError as error:
        raise InputError(f"{path}: the metadata {PREPROCESSING_KEY} is not JSON: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise InputError(f"{path}: the metadata {PREPROCESSING_KEY} is not a JSON object")
    return config or None


# ---- data -----------------------------------------------------------------------------------------------------------------


def _measure(model: _Classifier, data: str, batch_size: int, limit: int | None, seed: int) -> Accuracy:
    """Read the data the way the model wants it and measure."""
    fixed = model.spec.shape[0] if model.spec.shape else None
    size = fixed or batch_size
    path = Path(data).expanduser()
    batches: LabelledImages | LabelledArrays
    folder_classes = None
    if path.is_dir():
        if not model.preprocessing:
            warnings.warn("the model carries no image preprocessing; using its input size with ImageNet mean and std",
                          RepQuantWarning, stacklevel=3)
        if not model.spec.dtype.is_floating_point:
            raise InputError(f"evaluate is for image classifiers; the input {model.spec.name} is {model.spec.dtype}")
        target = image_size(model.spec.shape, model.preprocessing)
        batches = labelled_folder(path, model.preprocessing, target, size, limit, seed, dtype=model.spec.dtype)
        folder_classes = len(batches.classes)
    elif path.exists():
        batches = _labelled_arrays(path, model.spec, size, limit, seed)
    else:
        raise InputError(f"evaluation data {path} does not exist: give class folders of images, or a .npz or .safetensors "
                         "with images and labels")
    predict = _padded(model.predict, fixed) if fixed else model.predict
    return accuracy_of(predict, progress(batches, len(batches), "evaluating"), folder_classes=folder_classes)


def _labelled_arrays(path: Path, spec: InputSpec, batch_size: int, limit: int | None, seed: int) -> LabelledArrays:
    """`images` and `labels` of a file, checked against the model's input."""
    arrays = read_arrays(path) if path.suffix.lower() in (".npz", ".safetensors") else None
    if not isinstance(arrays, dict):
        raise InputError(f"evaluation data {path}: expected class folders of images, or a .npz or .safetensors")
    if not {"images", "labels"} <= arrays.keys():
        raise InputError(f"evaluation data {path} needs the arrays images and labels; found {', '.join(arrays) or 'none'}")
    images, stored = arrays["images"], arrays["labels"]
    labels = stored.double().numpy() if isinstance(stored, Tensor) and stored.is_floating_point() else np.asarray(stored)
    check_array(images, spec, str(path))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise InputError(f"evaluation data {path}: labels must be {len(images)} integers, one an image; "
                         f"found {labels.dtype} of shape {labels.shape}")
    if not len(labels):
        raise InputError(f"evaluation data {path}: there are no samples to evaluate")
    numbers = torch.from_numpy(labels.astype(np.int64))
    return LabelledArrays(images, numbers, _subset(len(labels), limit, seed), spec, str(path), batch_size)


def _subset(count: int, limit: int | None, seed: int) -> list[int]:
    """All indices, or `limit` of them by the seed, ascending."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _padded(predict: Predict, size: int) -> Predict:
    """`predict` of a model with a fixed batch: a smaller batch is filled with copies of its last image."""
    def padded(images: Tensor) -> Tensor:
        missing = size - len(images)
        if missing <= 0:
            return predict(images)
        outputs = predict(torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]))
        return outputs[:len(images)] if outputs.ndim and len(outputs) == size else outputs

    return padded


def _checked_outputs(outputs: Any, count: int) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != count or outputs.shape[1] == 0:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"evaluate is for classifiers, whose output is (batch, classes); for a batch of {count} this model gave "
                         f"{found}")
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


# ---- models ---------------------------------------------------------------------------------------------------------------


def _onnx_classifier(path: str, threads: int | None) -> _Classifier:
    """An ONNX file behind `predict`."""
    preprocessing = preprocessing_from_onnx(path)  # also says when the file is missing or no model
    from repquant_fx.runtime import session

    run = session(path, threads=threads)
    inputs = run.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _ONNX_FLOATS:
        wanted = ", ".join(f"{i.name} {i.type}" for i in inputs)
        raise InputError(f"evaluate is for image classifiers with one float input; {path} has: {wanted}")
    name, dtype = inputs[0].name, _ONNX_FLOATS[inputs[0].type]
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in inputs[0].shape)
    output = run.get_outputs()[0].name

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(run.run([output], {name: images.numpy()})[0]))

    return _Classifier(predict, InputSpec(name, shape, dtype), preprocessing)


def _torch_classifier(source: str, arch: str | None, allow_pickle: bool) -> _Classifier:
    """Any other source behind `predict`, in torch."""
    from repquant_fx.frontends.loading import load_model

    loaded = load_model(source, arch=arch, allow_pickle=allow_pickle)
    if len(loaded.example_inputs) != 1:
        raise InputError(f"evaluate is for image classifiers with one input; {source} has {len(loaded.example_inputs)}")
    example = loaded.example_inputs[0]
    fixed = None
    module: Callable[[Tensor], Any]
    if loaded.exported is not None:
        module, fixed = loaded.exported.module(check_guards=False), _fixed_batch(loaded.exported)
    else:
        assert loaded.module is not None
        module = loaded.module.eval()

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return _logits(module(images))

    return _Classifier(predict, InputSpec("input", (fixed, *example.shape[1:]), example.dtype), loaded.preprocessing)


def _fixed_batch(program: torch.export.ExportedProgram) -> int | None:
    """The batch size of a program whose batch is not symbolic."""
    users = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, Tensor) and value.ndim:
            return value.shape[0] if isinstance(value.shape[0], int) else None
    return None


def _logits(outputs: Any) -> Any:
    """The outputs of a classifier: a tensor, the `logits` of a record, or the first of several."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    return getattr(outputs, "logits", outputs)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Torch with this many threads, for a while."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
