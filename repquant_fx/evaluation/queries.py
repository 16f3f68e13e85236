"""What a detector of queries gives (DETR and its kin): logits, boxes and masks of each query, to objects in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.errors import InputError

MOST = 100  # objects of an image that COCO's measure looks at


@dataclass(frozen=True)
class Objects:
    """What was found in an image.

    Attributes:
        scores: shape (objects,).
        labels: the model's own classes, shape (objects,), int64.
        boxes: x1, y1, x2, y2 in pixels, shape (objects, 4); None where the model gives none.
        masks: shape (objects, height, width), bool; None likewise.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor | None = None
    masks: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """Outputs of a batch: logits (batch, queries, classes), boxes (batch, queries, 4) as centre and size in shares of
    the image, masks (batch, queries, h, w) as logits.
    """

    logits: Tensor
    boxes: Tensor | None
    masks: Tensor | None


def read_queries(outputs: Mapping[str, Tensor], source: str) -> Queries:
    """The outputs of these names in transformers.

    Raises:
        InputError: there are no class logits, or neither boxes nor masks; or they are not finite.
    """
    logits = outputs.get("logits", outputs.get("class_queries_logits"))
    boxes, masks = outputs.get("pred_boxes"), outputs.get("pred_masks", outputs.get("masks_queries_logits"))
    if logits is None or logits.ndim != 3 or (boxes is None and masks is None):
        shapes = ", ".join(f"{name} {list(o.shape)}" for name, o in outputs.items())
        raise InputError("detection needs logits of queries with pred_boxes or pred_masks, as transformers' detectors "
                         f"give them; {source} gives {shapes or 'no tensor'}")
    for name, given in (("logits", logits), ("boxes", boxes), ("masks", masks)):
        if given is not None and not torch.isfinite(given).all():
            raise InputError(f"the {name} of {source} are NaN or infinite")
    return Queries(logits.float(), boxes, masks)


def objects_of(queries: Queries, sizes: Sequence[tuple[int, int]], *, background: bool) -> list[Objects]:
    """The surest objects of each image, `MOST` at most.

    Args:
        sizes: (height, width) of each image.
        background: the last class is "nothing": probabilities are a Softmax, and with boxes each query is one object.
            Else they are Sigmoids, and a query may be several. Without boxes a query may be several in both cases, and
            its score is multiplied by how sure its mask is.
    """
    found = []
    for index, (height, width) in enumerate(sizes):
        logits = queries.logits[index]
        shares = logits.softmax(-1)[:, :-1] if background else logits.sigmoid()
        if background and queries.boxes is not None:
            scores, labels = shares.max(-1)
            scores, rows = scores.topk(min(MOST, len(scores)))
            labels = labels[rows]
        else:
            scores, flat = shares.flatten().topk(min(MOST, shares.numel()))
            rows, labels = flat // shares.shape[1], flat % shares.shape[1]
        boxes = None if queries.boxes is None else corners(queries.boxes[index][rows].float(), height, width)
        masks = None
        if queries.masks is not None:
            drawn = resized(queries.masks[index][rows].float(), height, width)
            masks = drawn > 0
            if boxes is None:
                inside = (drawn.sigmoid() * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
                scores = scores * inside
        found.append(Objects(scores, labels, boxes, masks))
    return found


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Centre and size in shares of the image, shape (n, 4), to x1, y1, x2, y2 in pixels, inside the image."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    scaled = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
    return scaled * torch.tensor([width, height, width, height])


def resized(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks, shape (n, h, w), float, bilinearly to (n, height, width)."""
    return torch.nn.functional.interpolate(masks[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def has_background(classes: int, known: int | None, categories: Mapping[int, str]) -> bool:
    """Whether the last of the model's classes is "nothing".

    Args:
        classes: of its logits.
        known: that the model's configuration names; None where there is none.
        categories: of the annotations, by number.

    Raises:
        InputError: it cannot be told.
    """
    counts = [known] if known is not None else [len(categories), max(categories) + 1]
    if classes - 1 in counts:
        return True
    if classes in counts:
        return False
    raise InputError(
        f"the model's logits have {classes} classes, "
        + (f"its configuration names {known}" if known is not None else
           f"and the annotations {len(categories)} categories; keep the model's config.json beside the file (compile "
           "into a directory)")
    )


def categories_of(classes: int, names: Mapping[int, str] | None, categories: Mapping[int, str]) -> list[int | None]:
    """The category of each of the model's classes: by name; else class i is category i where there are as many numbers,
    or the i-th category.

    Raises:
        InputError: none of it fits.
    """
    if names is not None:
        numbers = {name.lower(): number for number, name in categories.items()}
        matched = [numbers.get(str(names.get(i, "")).lower()) for i in range(classes)]
        if set(numbers.values()) <= set(matched):
            return matched
    if classes > max(categories):
        return [i if i in categories else None for i in range(classes)]
    if classes == len(categories):
        return list(categories)
    raise InputError(f"the model has {classes} classes, the annotations {len(categories)} categories with numbers to "
                     f"{max(categories)}, and their names are not the model's")
