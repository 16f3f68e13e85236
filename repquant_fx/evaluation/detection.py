"""Box and mask average precision of detectors, on images with annotations in COCO's format.

Two kinds of models: those that give logits and boxes, or masks, of queries (transformers' detectors, as a model or as
an exported file), and modules that take a list of images and give a dictionary for each (torchvision's). A module of
either may run from a compiled file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from repquant_fx.calibration.images import (
    ImageReader,
    Unreadable,
    image_size,
    read_ahead,
    read_pixels,
    unreadable_error,
)
from repquant_fx.errors import InputError, RepQuantWarning, first_line
from repquant_fx.evaluation.classification import subset
from repquant_fx.evaluation.coco import (
    Annotations,
    AveragePrecision,
    Detection,
    Picture,
    average_precision,
    encode_mask,
    read_annotations,
    require_pycocotools,
)
from repquant_fx.evaluation.queries import MOST, Objects, categories_of, has_background, objects_of, read_queries
from repquant_fx.evaluation.runners import Runner, first_rows, load_torch, open_runner, runner_of
from repquant_fx.frontends.huggingface import is_huggingface
from repquant_fx.frontends.signature import is_transformers
from repquant_fx.options import Source
from repquant_fx.progress import progress

Read: TypeAlias = Callable[[Path], Tensor | Unreadable]
_ANY_SHAPE = (3, 224, 224)  # a detector of lists takes images of any size; nothing runs on this one


@dataclass(frozen=True)
class Detector:
    """A model that finds objects.

    Attributes:
        read: makes of a file what `find` takes.
        find: (images, their sizes (height, width)) to what is in each, labels as categories of the annotations.
        batch: images at a time; None for as many as wanted.
    """

    read: Read
    find: Callable[[list[Tensor], list[tuple[int, int]]], list[Objects]]
    batch: int | None = None


def open_detector(
    source: Source, threads: int | None = None, modules: Mapping[str, str] | None = None
) -> Runner | nn.Module:
    """A `Runner` of queries, or a module that takes lists of images.

    Args:
        modules: files that run in place of modules, by their paths; see `compiled_module.run_from_file`.

    Raises:
        InputError: the model or a file cannot be loaded.
    """
    name = str(source.model)
    if Path(name).suffix.lower() == ".onnx" or is_huggingface(name):
        with warnings.catch_warnings():  # images are resized as a whole here, whatever the processor does
            warnings.filterwarnings("ignore", message=".*does not lead to one size", category=RepQuantWarning)
            return open_runner(source, threads, modules)
    loaded = load_torch(replace(source, input_shape=source.input_shape or _ANY_SHAPE), threads, modules)
    if loaded.module is None or is_transformers(loaded.module):
        return runner_of(loaded, name)
    return loaded.module


def detection(
    model: Runner | nn.Module,
    data: Path,
    *,
    coco: str | Path,
    batch_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> AveragePrecision:
    """Average precision of boxes, and of masks where the model and the annotations have them.

    Args:
        model: a runner of queries; or a module that takes a list of images, RGB in [0, 1], and gives for each a
            dictionary with boxes (x1, y1, x2, y2 in pixels), labels (numbers of categories), scores and maybe masks.
        data: the folder of the images.
        coco: annotations, see `coco.read_annotations`.
        batch_size: images at a time.
        limit: a random subset of this many images.
        seed: of the subset.

    Raises:
        InputError: pycocotools is missing, or model, images and annotations do not fit.
    """
    require_pycocotools()
    annotations = read_annotations(coco, data)
    pictures = [annotations.pictures[i] for i in subset(len(annotations.pictures), limit, seed)]
    detector = _of_queries(model, annotations) if isinstance(model, Runner) else _of_lists(model)
    size = detector.batch or batch_size
    found: list[Detection] = []
    batches = read_batches(pictures, detector.read, size)
    for part, images in progress(batches, -(-len(pictures) // size), "evaluating"):
        objects = detector.find(images, [(picture.height, picture.width) for picture in part])
        for picture, each in zip(part, objects, strict=True):
            found += detections(picture, each, annotations)
    return average_precision(annotations, found, pictures)


def read_batches(
    pictures: Sequence[Picture], read: Read, size: int
) -> Iterator[tuple[Sequence[Picture], list[Tensor]]]:
    """Images in their order, decoded ahead.

    Raises:
        CalibrationError: images of a batch are missing or unreadable; they are named.
    """
    rows = read_ahead(read, (picture.path for picture in pictures), ahead=max(4, 2 * size))
    for start in range(0, len(pictures), size):
        part = pictures[start:start + size]
        images = [next(rows) for _ in part]
        if failures := [image for image in images if isinstance(image, Unreadable)]:
            raise unreadable_error(failures)
        yield part, [image for image in images if isinstance(image, Tensor)]


def detections(picture: Picture, objects: Objects, annotations: Annotations) -> list[Detection]:
    """The objects whose labels are categories of the annotations."""
    found = []
    for index in objects.scores.argsort(descending=True)[:MOST].tolist():
        category = int(objects.labels[index])
        if category not in annotations.categories:
            continue
        box = mask = None
        if objects.boxes is not None:
            left, top, right, bottom = objects.boxes[index].tolist()
            box = (left, top, max(0.0, right - left), max(0.0, bottom - top))
        if objects.masks is not None:
            mask = encode_mask(objects.masks[index])
        found.append(Detection(picture.number, category, float(objects.scores[index]), box, mask))
    return found


def _of_queries(runner: Runner, annotations: Annotations) -> Detector:
    images = [spec for spec in runner.inputs if len(spec.shape) == 4 and spec.dtype.is_floating_point]
    if len(images) != 1 or len(runner.inputs) != 1:
        takes = ", ".join(spec.name for spec in runner.inputs)
        raise InputError(f"detection needs a model that takes images alone; {runner.source} takes {takes}")
    spec = images[0]
    # boxes are shares of the whole image: nothing may be cropped
    preprocessing = {**(runner.preprocessing or {}), "crop_mode": "squash", "crop_pct": 1.0}
    reader = ImageReader(preprocessing, image_size(spec.shape, runner.preprocessing))
    names = runner.labels

    def find(pictures: list[Tensor], sizes: list[tuple[int, int]]) -> list[Objects]:
        outputs = runner({spec.name: torch.stack(pictures)})
        queries = read_queries({n: first_rows(o, len(pictures)) for n, o in outputs.items()}, runner.source)
        classes = queries.logits.shape[2]
        background = has_background(classes, None if names is None else len(names), annotations.categories)
        places = categories_of(classes - background, names, annotations.categories)
        table = torch.tensor([-1 if place is None else place for place in places])
        return [replace(each, labels=table[each.labels])
                for each in objects_of(queries, sizes, background=background)]

    return Detector(reader, find, runner.limit(spec.name, 0) or None)


def _of_lists(module: nn.Module) -> Detector:
    def find(pictures: list[Tensor], sizes: list[tuple[int, int]]) -> list[Objects]:
        for picture, size in zip(pictures, sizes, strict=True):
            if tuple(picture.shape[1:]) != size:
                raise InputError(f"an image has {picture.shape[2]}x{picture.shape[1]} pixels, by the annotations "
                                 f"{size[1]}x{size[0]}")
        try:
            with torch.inference_mode():
                outputs = module.eval()(pictures)
            return [_objects(each) for each in outputs]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{type(module).__name__} is no detector that takes a list of images and gives boxes, labels and "
                f"scores of each: {type(error).__name__}: {first_line(error)}"
            ) from error

    return Detector(read_pixels, find, 1)


def _objects(output: Mapping[str, Tensor]) -> Objects:
    masks = output.get("masks")
    if not torch.isfinite(output["scores"]).all() or not torch.isfinite(output["boxes"]).all():
        raise InputError("the boxes or scores of the detector are NaN or infinite")
    return Objects(output["scores"], output["labels"], output["boxes"],
                   None if masks is None else masks.reshape(-1, *masks.shape[-2:]) > 0.5)
