"""A made-up data set in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = {3: "crate", 7: "plate"}
COLOURS = {3: (250, 0, 0), 7: (0, 250, 0)}
SIZES = ((30, 40), (40, 30), (36, 36), (32, 48))  # height, width
# of each image: category, x, y, width, height
RECTANGLES = (
    ((3, 2, 3, 12, 9), (7, 20, 10, 15, 15)),
    ((7, 5, 5, 20, 10),),
    ((3, 0, 0, 18, 18), (3, 20, 20, 10, 12)),
    ((7, 30, 4, 12, 20), (3, 4, 8, 16, 16)),
)

Segment = Callable[[Sequence[int], tuple[int, int]], Any]


def polygon(box: Sequence[int], size: tuple[int, int]) -> list[list[int]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def runs(box: Sequence[int], size: tuple[int, int]) -> dict[str, Any]:
    """Uncompressed run lengths, column by column."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[box[1]:box[1] + box[3], box[0]:box[0] + box[2]] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(size), "counts": lengths if flat[0] == 0 else [0, *lengths]}


def write(root: Path, segment: Segment = polygon) -> tuple[Path, Path]:
    """(annotations, the folder of the images): rectangles of two colours."""
    images = root / "images"
    images.mkdir(parents=True)
    table: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        "annotations": [],
    }
    for number, (size, objects) in enumerate(zip(SIZES, RECTANGLES), 1):
        picture = np.full((*size, 3), 20, dtype=np.uint8)
        for category, *box in objects:
            x, y, w, h = box
            picture[y:y + h, x:x + w] = COLOURS[category]
            table["annotations"].append({
                "id": len(table["annotations"]) + 1, "image_id": number, "category_id": category, "bbox": box,
                "area": w * h, "iscrowd": 0, "segmentation": segment(box, size)})
        Image.fromarray(picture).save(images / f"{number:012}.png")
        table["images"].append(
            {"id": number, "file_name": f"{number:012}.png", "height": size[0], "width": size[1]})
    path = root / "instances.json"
    path.write_text(json.dumps(table))
    return path, images
