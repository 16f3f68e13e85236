"""Annotations in COCO's format, and average precision by COCO's own measure (pycocotools).

An annotations file is untrusted: its sizes, polygons and run lengths are checked before code in C sees them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from repquant_fx.calibration.text import check_text_size
from repquant_fx.errors import InputError, first_line
from repquant_fx.files import irregular

_LONGEST_SIDE = 65_536  # pixels of an image
_MOST_CORNERS = 100_000  # of a polygon
_FIELDS = {"bbox": "bbox", "segm": "segmentation"}  # by the name of the measure


@dataclass(frozen=True)
class Picture:
    """An annotated image: its number, its file, its size in pixels."""

    number: int
    path: Path
    height: int
    width: int


@dataclass(frozen=True)
class Annotations:
    """What a file in COCO's format says.

    Attributes:
        path: of the file.
        pictures: in the order of their numbers.
        categories: name by number, in the order of the numbers.
        objects: COCO's records, by the number of their picture.
        masks: whether all of them have masks.
    """

    path: Path
    pictures: tuple[Picture, ...]
    categories: Mapping[int, str]
    objects: Mapping[int, tuple[dict[str, Any], ...]]
    masks: bool


@dataclass(frozen=True)
class Detection:
    """One object that a model found.

    Attributes:
        picture, category: their numbers.
        score: the higher, the surer.
        box: x, y, width, height in pixels; None where the model gives no boxes.
        mask: shape (height, width) of the picture, as `encode_mask` gives it; None likewise.
    """

    picture: int
    category: int
    score: float
    box: tuple[float, float, float, float] | None = None
    mask: dict[str, Any] | None = None


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision in percent: over IoU from 0.5 to 0.95, at 0.5, and at 0.75.

    Attributes:
        box_ap, box_ap50, box_ap75: of boxes; None where the model gives none.
        mask_ap, mask_ap50, mask_ap75: of masks, likewise.
        images: evaluated.
    """

    box_ap: float | None
    box_ap50: float | None
    box_ap75: float | None
    mask_ap: float | None
    mask_ap50: float | None
    mask_ap75: float | None
    images: int

    def __str__(self) -> str:
        parts = [
            f"{kind} AP {whole:.2f}  AP50 {half:.2f}  AP75 {strict:.2f}"
            for kind, whole, half, strict in (("box", self.box_ap, self.box_ap50, self.box_ap75),
                                              ("mask", self.mask_ap, self.mask_ap50, self.mask_ap75))
            if whole is not None and half is not None and strict is not None
        ]
        return f"{'  '.join(parts)}  ({self.images} images)"


def read_annotations(path: str | Path, folder: Path) -> Annotations:
    """Images, categories and objects of a file such as `instances_val2017.json`.

    Args:
        folder: of the images; names of files are relative to it.

    Raises:
        InputError: unreadable, malformed, or sizes that no image has; says where.
    """
    path = Path(path).expanduser()
    stored = read_json(path, "annotations")
    if not isinstance(stored, dict):
        raise InputError(f"annotations {path}: expected an object with images, annotations and categories")
    tables = {name: stored.get(name) for name in ("images", "annotations", "categories")}
    for name, table in tables.items():
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise InputError(f"annotations {path}: {name} must be a list of objects")
    pictures = {each.number: each for each in _rows(tables["images"], path, "images", lambda r: _picture(r, folder))}
    categories = dict(_rows(tables["categories"], path, "categories", _category))
    if not pictures or not categories:
        raise InputError(f"annotations {path}: there are no {'categories' if pictures else 'images'}")
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in pictures}
    for record in _rows(tables["annotations"], path, "annotations", lambda r: _object(r, pictures, categories)):
        objects[record["image_id"]].append(record)
    ordered = tuple(pictures[number] for number in sorted(pictures))
    every = [record for records in objects.values() for record in records]
    return Annotations(path, ordered, {n: categories[n] for n in sorted(categories)},
                       {n: tuple(records) for n, records in objects.items()},
                       bool(every) and all("segmentation" in record for record in every))


def read_json(path: Path, what: str) -> Any:
    """A JSON file that fits into memory.

    Raises:
        InputError: it does not, or is none.
    """
    if kind := irregular(path):
        raise InputError(f"{what} {path} is {kind}, not a file")
    check_text_size(path, what)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path}: not valid JSON: {first_line(error)}") from error


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """A mask, shape (height, width), bool, in COCO's run lengths."""
    from pycocotools import mask as coding

    encoded: dict[str, Any] = coding.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return encoded


def average_precision(
    annotations: Annotations, found: Sequence[Detection], pictures: Sequence[Picture]
) -> AveragePrecision:
    """COCO's measure of what was found in some of the pictures, boxes and masks.

    Raises:
        InputError: pycocotools is not installed.
    """
    require_pycocotools()
    numbers = [picture.number for picture in pictures]
    boxed, masked = (all(getattr(d, key) is not None for d in found) for key in ("box", "mask"))
    return AveragePrecision(*_statistics(annotations, found, numbers, "bbox", boxed),
                            *_statistics(annotations, found, numbers, "segm", masked and annotations.masks),
                            len(numbers))


def require_pycocotools() -> None:
    """Raises:
        InputError: pycocotools is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"COCO's measure needs pycocotools ({error}): pip install 'repquant-fx[coco]'"
        ) from error


def _statistics(
    annotations: Annotations, found: Sequence[Detection], numbers: Sequence[int], kind: str, given: bool
) -> tuple[float | None, float | None, float | None]:
    """AP, AP50 and AP75 in percent: 0 where nothing was found, None where this kind is not given."""
    if not given:
        return None, None, None
    if not found:
        return 0.0, 0.0, 0.0
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": p.number, "height": p.height, "width": p.width} for p in annotations.pictures],
            "categories": [{"id": number, "name": name} for number, name in annotations.categories.items()],
            "annotations": [dict(record) for records in annotations.objects.values() for record in records],
        }
        truth.createIndex()
        rows = [{"image_id": d.picture, "category_id": d.category, "score": d.score,
                 _FIELDS[kind]: list(d.box or ()) if kind == "bbox" else d.mask} for d in found]
        measure = COCOeval(truth, truth.loadRes(rows), kind)
        measure.params.imgIds = list(numbers)
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    whole, half, strict = (100.0 * max(0.0, float(value)) for value in measure.stats[:3])
    return whole, half, strict


def _rows(table: Any, path: Path, name: str, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Each record of a table; the first that is wrong is named."""
    found = []
    for index, row in enumerate(table):
        try:
            found.append(read(row))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise InputError(f"annotations {path}: {name}[{index}]: {said}") from error
    return found


def _picture(row: dict[str, Any], folder: Path) -> Picture:
    name = PurePosixPath(str(row["file_name"]))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise ValueError(f"the file_name {str(name)[:80]!r} leads out of the folder of the images")
    sides = [_integer(row[key], key) for key in ("height", "width")]
    if not all(1 <= side <= _LONGEST_SIDE for side in sides):
        raise ValueError(f"an image of {sides[1]}x{sides[0]} pixels")
    return Picture(_integer(row["id"], "id"), folder / name, *sides)


def _category(row: dict[str, Any]) -> tuple[int, str]:
    return _integer(row["id"], "id"), str(row["name"])


def _object(row: dict[str, Any], pictures: Mapping[int, Picture], categories: Mapping[int, str]) -> dict[str, Any]:
    """The fields of a record that the measure reads, checked."""
    number, category = (_integer(row[key], key) for key in ("image_id", "category_id"))
    if number not in pictures or category not in categories:
        raise ValueError(f"image {number} or category {category} is not in the file")
    picture = pictures[number]
    record: dict[str, Any] = {"id": _integer(row["id"], "id"), "image_id": number, "category_id": category,
              "bbox": list(read_box(row["bbox"])), "area": float(row.get("area", row["bbox"][2] * row["bbox"][3])),
              "iscrowd": int(bool(row.get("iscrowd", 0)))}
    if not math.isfinite(record["area"]):
        raise ValueError("the area is not finite")
    if row.get("segmentation"):
        record["segmentation"] = _segmentation(row["segmentation"], picture)
    return record


def read_box(value: Any) -> tuple[float, float, float, float]:
    """Four finite numbers: x, y, width, height.

    Raises:
        ValueError: they are not.
    """
    numbers = tuple(float(each) for each in value) if isinstance(value, list) else ()
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0:
        raise ValueError("bbox must be x, y, width and height")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _segmentation(value: Any, picture: Picture) -> Any:
    """Polygons with their corners inside the picture, or run lengths that fill it."""
    if isinstance(value, list):
        return [_polygon(each, picture) for each in value]
    height, width = (int(side) for side in value["size"])
    if (height, width) != (picture.height, picture.width):
        raise ValueError(f"a mask of {width}x{height} on an image of {picture.width}x{picture.height}")
    counts = value["counts"]
    lengths = [_integer(count, "counts") for count in counts] if isinstance(counts, list) else _run_lengths(str(counts))
    if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise ValueError(f"the run lengths of a mask do not add up to {height * width} pixels")
    if isinstance(counts, list):
        from pycocotools import mask as coding

        return coding.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    return {"size": [height, width], "counts": str(counts)}


def _polygon(corners: Any, picture: Picture) -> list[float]:
    """Clipped to the picture: lines far outside of it would be drawn, too."""
    numbers = np.asarray(corners, dtype=np.float64)
    if numbers.ndim != 1 or not 6 <= len(numbers) <= _MOST_CORNERS or len(numbers) % 2:
        raise ValueError("a polygon is a list of at least 3 corners, x and y in turn")
    if not np.isfinite(numbers).all():
        raise ValueError("a corner of a polygon is not finite")
    clipped: list[float] = numbers.reshape(-1, 2).clip(-1, [picture.width + 1, picture.height + 1]).ravel().tolist()
    return clipped


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a letter, the lowest first, the sixth says that more follow; from the
    fourth length on the difference to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for letter in text.encode("ascii", "replace"):
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError("the run lengths of a mask are damaged")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the run lengths of a mask are damaged")
    return lengths


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**53) < value < 2**53:
        raise ValueError(f"{what} must be a whole number, not {str(value)[:40]!r}")
    return value
