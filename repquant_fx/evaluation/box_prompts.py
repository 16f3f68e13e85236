"""Mask average precision of a model that is prompted with boxes (SAM and its kin), on images with annotations in COCO's
format.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repquant_fx.calibration.images import mean_and_deviation, read_pixels
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
    read_box,
    read_json,
    require_pycocotools,
)
from repquant_fx.evaluation.detection import read_batches
from repquant_fx.evaluation.queries import MOST, resized
from repquant_fx.evaluation.runners import load_torch
from repquant_fx.frontends.architectures import config_image_shape
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.options import Source
from repquant_fx.progress import progress

_TAKES = ("pixel_values", "input_boxes")


@dataclass(frozen=True)
class Prompt:
    """A box in pixels (x, y, width, height), the category of what is in it, and how sure that is."""

    box: tuple[float, float, float, float]
    category: int
    score: float


def open_prompted(
    source: Source, threads: int | None = None, modules: Mapping[str, str] | None = None
) -> LoadedModel:
    """A transformers model that takes images and boxes; files may run in place of its modules.

    Raises:
        InputError: it cannot be loaded, or takes something else.
    """
    with warnings.catch_warnings():  # images are resized here, as the processor does
        warnings.filterwarnings("ignore", message=".*does not lead to one size", category=RepQuantWarning)
        loaded = load_torch(source, threads, modules)
    takes = inspect.signature(loaded.module.forward).parameters if loaded.module is not None else {}
    if not set(_TAKES) <= set(takes) or config_image_shape(loaded.module) is None:  # type: ignore[arg-type]
        raise InputError(f"box-prompts is of models that take {' and '.join(_TAKES)}, such as SAM in a transformers "
                         f"directory; {loaded.source} takes {', '.join(takes)}; give a compiled image encoder by "
                         "--module vision_encoder=encoder.onnx")
    return loaded


def box_prompts(
    model: LoadedModel,
    data: Path,
    *,
    coco: str | Path,
    boxes: str | Path | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> AveragePrecision:
    """Average precision of the masks that a model draws for boxes; one mask a box, scored as the box is.

    Args:
        model: see `open_prompted`.
        data: the folder of the images.
        coco: annotations, see `coco.read_annotations`.
        boxes: what a detector found, in COCO's format of results; the annotated boxes themselves where None.
        batch_size: not used; images are of different sizes, and each is encoded once.
        limit: a random subset of this many images.
        seed: of the subset.

    Raises:
        InputError: pycocotools is missing, or model, images, boxes and annotations do not fit.
    """
    require_pycocotools()
    annotations = read_annotations(coco, data)
    if not annotations.masks:
        raise InputError(f"annotations {annotations.path} have objects without masks, so there is nothing to compare "
                         "masks with")
    prompts = _annotated(annotations) if boxes is None else read_prompts(boxes, annotations)
    pictures = [annotations.pictures[i] for i in subset(len(annotations.pictures), limit, seed)]
    found: list[Detection] = []
    for (picture,), (image,) in progress(read_batches(pictures, read_pixels, 1), len(pictures), "evaluating"):
        if wanted := prompts.get(picture.number, [])[:MOST]:
            found += _drawn(model, picture, image, wanted)
    return average_precision(annotations, found, pictures)


def read_prompts(path: str | Path, annotations: Annotations) -> dict[int, list[Prompt]]:
    """Boxes of a detector by the number of their image, the surest first: a list of objects with image_id, category_id,
    bbox and score. Those of images or categories that are not in the annotations are left out.

    Raises:
        InputError: unreadable or malformed; with the number of the record.
    """
    path = Path(path).expanduser()
    stored = read_json(path, "boxes")
    if not isinstance(stored, list):
        raise InputError(f"boxes {path}: expected a list of objects with image_id, category_id, bbox and score")
    found: dict[int, list[Prompt]] = {}
    for index, row in enumerate(stored):
        try:
            number, prompt = int(row["image_id"]), Prompt(read_box(row["bbox"]), int(row["category_id"]),
                                                          float(row["score"]))
            if not abs(prompt.score) < float("inf"):
                raise ValueError("the score is not finite")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise InputError(f"boxes {path}: [{index}]: {said}") from error
        if number in annotations.objects and prompt.category in annotations.categories:
            found.setdefault(number, []).append(prompt)
    return {number: sorted(group, key=lambda p: -p.score) for number, group in found.items()}


def _annotated(annotations: Annotations) -> dict[int, list[Prompt]]:
    return {number: [Prompt(read_box(record["bbox"]), record["category_id"], 1.0) for record in records
                     if not record["iscrowd"]]
            for number, records in annotations.objects.items()}


@torch.inference_mode()
def _drawn(model: LoadedModel, picture: Picture, image: Tensor, prompts: list[Prompt]) -> list[Detection]:
    """One mask for each box."""
    if tuple(image.shape[1:]) != (picture.height, picture.width):
        raise InputError(f"{picture.path} has {image.shape[2]}x{image.shape[1]} pixels, by the annotations "
                         f"{picture.width}x{picture.height}")
    assert model.module is not None
    shape = config_image_shape(model.module)
    assert shape is not None
    side = max(shape[1:])
    pixels, (height, width) = fitted(image, side, model.preprocessing)
    corners = torch.tensor([[p.box[0], p.box[1], p.box[0] + p.box[2], p.box[1] + p.box[3]] for p in prompts])
    scaled = corners * torch.tensor([width / picture.width, height / picture.height] * 2)
    try:
        with model.guard:
            outputs: Any = model.module(pixel_values=pixels[None], input_boxes=scaled[None], multimask_output=False)
        masks = outputs["pred_masks"][0, :, 0].float()
    except Exception as error:
        raise InputError(f"{model.source} does not draw masks for {len(prompts)} boxes on {tuple(pixels.shape)}: "
                         f"{type(error).__name__}: {first_line(error)}") from error
    if not torch.isfinite(masks).all():
        raise InputError(f"the masks of {model.source} are NaN or infinite")
    whole = resized(masks, side, side)[:, :height, :width]
    return [
        Detection(picture.number, prompt.category, prompt.score, None, encode_mask(mask))
        for prompt, mask in zip(prompts, resized(whole, picture.height, picture.width) > 0, strict=True)
    ]


def fitted(image: Tensor, side: int, preprocessing: Mapping[str, Any] | None) -> tuple[Tensor, tuple[int, int]]:
    """An image, shape (3, height, width), in [0, 1], as SAM takes it: its longest edge resized to `side`, normalised,
    filled up with zeros on the right and below to (3, side, side); and the (height, width) that it has there.
    """
    scale = side / max(image.shape[1:])
    height, width = (max(1, int(size * scale + 0.5)) for size in image.shape[1:])
    small = torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True,
                                            align_corners=False)[0]
    mean, deviation = mean_and_deviation(preprocessing, 3)
    padded = torch.nn.functional.pad((small - mean) / deviation, (0, side - width, 0, side - height))
    return padded, (height, width)
