"""Reading images: which files of a folder are images, the preprocessing, and decoding in threads ahead of the consumer.

Calibration and evaluation share this module, so that a model is calibrated on the very tensors it is evaluated on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from repquant_fx.errors import CalibrationError
from repquant_fx.files import irregular

if TYPE_CHECKING:
    from PIL.Image import Image

S = TypeVar("S")
R = TypeVar("R")

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_SIDE = 224
# PIL goes by the content: without this, a file called .png could be PostScript, which it hands to a program
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM")
_LONGEST = 100  # times as long as wide: resizing the short edge multiplies the long one
_MOST_PIXELS = 128_000_000  # several are decoded at a time
NAMED_FILES = 5
_TIMM_KEYS = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
_DECODERS = max(2, min(8, os.cpu_count() or 2))


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded, and why."""

    path: Path
    reason: str


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by path; hidden files and folders are left out, links are followed
    once.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(root, name) for name in files if is_image_name(name)]
    return sorted(paths)


def is_image_name(name: str) -> bool:
    """Whether a file name looks like an image and is not hidden (`._x.jpg` of macOS is no image)."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_size(shape: Sequence[int | None], preprocessing: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """Channels, height and width that a model wants.

    Args:
        shape: of the model's input, batch first: (N, C, H, W). None is a free dimension.
        preprocessing: its `input_size` (C, H, W) fills the free dimensions; failing that, 3 channels and 224 pixels.

    Raises:
        CalibrationError: the input is not 4-D, or has neither 1 nor 3 channels.
    """
    if len(shape) != 4:
        raise CalibrationError(f"the model's input {shape_text(shape)} is not an image batch (N, C, H, W), "
                               "so a folder of images cannot feed it; give arrays or a module:callable")
    stored = (preprocessing or {}).get("input_size") or (3, DEFAULT_SIDE, DEFAULT_SIDE)
    if not isinstance(stored, Sequence) or len(stored) != 3:
        raise CalibrationError(f"preprocessing: input_size must be (channels, height, width), not {stored!r}")
    channels, height, width = (
        int(own if own is not None else other) for own, other in zip(shape[1:], stored, strict=True)
    )
    if channels not in (1, 3):
        raise CalibrationError(
            f"the model's input {shape_text(shape)} has {channels} channels; image files give 1 or 3"
        )
    return channels, height, width


def shape_text(shape: Iterable[int | None]) -> str:
    """A shape for messages: `(N, 3, 224, 224)`, with `?` for a free dimension other than the batch."""
    dims = list(shape)
    texts = [str(d) if d is not None else ("N" if i == 0 else "?") for i, d in enumerate(dims)]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def describe_preprocessing(preprocessing: Mapping[str, Any] | None, size: tuple[int, int, int]) -> str:
    """One phrase for reports: which preprocessing the images went through."""
    where = f"{size[1]}x{size[2]}"
    if not preprocessing:
        return f"resized to {where} with ImageNet mean and std, for the model file carries no preprocessing"
    return f"the model's own preprocessing to {where}"


class ImageReader:
    """Turns an image file into a float32 tensor (C, H, W), through timm's evaluation transform. Safe to call from
    threads.
    """

    def __init__(self, preprocessing: Mapping[str, Any] | None, size: tuple[int, int, int]) -> None:
        """
        Args:
            preprocessing: a timm data config (interpolation, mean, std, crop_pct, crop_mode); other keys are ignored.
                None: the shortest edge is resized to the input, the centre is cropped, ImageNet mean and std.
            size: (C, H, W) of the tensors.

        Raises:
            CalibrationError: the vision extra is not installed, or the preprocessing is invalid.
        """
        create_transform = _timm_create_transform()
        self.size = size
        options = {key: preprocessing[key] for key in _TIMM_KEYS if preprocessing.get(key) is not None} \
            if preprocessing else {"crop_pct": 1.0, "interpolation": "bicubic"}
        options.update(_normalisation(preprocessing, size[0]))
        try:
            self.transform: Callable[[Image], Tensor] = create_transform(input_size=size, is_training=False, **options)
        except Exception as error:
            raise CalibrationError(
                f"the preprocessing {options} cannot be built: {type(error).__name__}: {error}"
            ) from error

    def __call__(self, path: Path) -> Tensor | Unreadable:
        """The image as float32 (C, H, W), or why it cannot be read."""
        return read_image(path, lambda image: self.transform(_to_channels(image, self.size[0])))


def read_image(path: Path, convert: Callable[[Image], Tensor]) -> Tensor | Unreadable:
    """What `convert` makes of an image, or why it cannot be read."""
    from PIL import Image

    if kind := irregular(path):
        return Unreadable(path, f"it is {kind}")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                return Unreadable(path, f"{image.width}x{image.height} pixels are more than {_MOST_PIXELS}")
            if max(image.size) > _LONGEST * min(image.size):
                return Unreadable(path, f"{image.width}x{image.height} pixels are too long and thin")
            return convert(image)
    except Exception as error:
        return Unreadable(path, str(error).splitlines()[0] if str(error) else type(error).__name__)


def read_pixels(path: Path) -> Tensor | Unreadable:
    """The image as it is: float32 (3, height, width), RGB in [0, 1]; or why it cannot be read."""
    return read_image(path, lambda image: torch.from_numpy(
        np.asarray(_to_channels(image, 3), dtype=np.float32) / 255).permute(2, 0, 1).contiguous())


def mean_and_deviation(preprocessing: Mapping[str, Any] | None, channels: int) -> tuple[Tensor, Tensor]:
    """What pixels in [0, 1] are normalised by, each (channels, 1, 1); ImageNet's where the preprocessing names none.

    Raises:
        CalibrationError: the preprocessing is invalid.
    """
    mean, deviation = (torch.tensor(v).reshape(-1, 1, 1) for v in _normalisation(preprocessing, channels).values())
    return mean, deviation


def _normalisation(preprocessing: Mapping[str, Any] | None, channels: int) -> dict[str, tuple[float, ...]]:
    """Mean and std, a float a channel."""
    found = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    found |= {key: preprocessing[key] for key in found if preprocessing and preprocessing.get(key) is not None}
    return {key: _per_channel(key, value, channels, positive=key == "std") for key, value in found.items()}


def read_ahead(function: Callable[[S], R], items: Iterable[S], ahead: int = 64) -> Iterator[R]:
    """`map(function, items)` in order, computed by threads at most `ahead` items before the consumer."""
    pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def unreadable_error(failures: Sequence[Unreadable]) -> CalibrationError:
    """The error that names the first unreadable files and counts the rest."""
    named = "; ".join(f"{f.path} ({f.reason})" for f in failures[:NAMED_FILES])
    more = f"; and {len(failures) - NAMED_FILES} more" if len(failures) > NAMED_FILES else ""
    plural = "image is" if len(failures) == 1 else "images are"
    return CalibrationError(f"{len(failures)} {plural} unreadable or truncated: {named}{more}")


def _timm_create_transform() -> Callable[..., Any]:
    try:
        import PIL.Image
        from timm.data import create_transform
    except ImportError as error:
        raise CalibrationError(f"reading images needs timm, torchvision and pillow ({error}); "
                               "install them with: pip install 'repquant-fx[vision]'") from error
    PIL.Image.init()  # plugins are registered once, before the threads start
    return create_transform


def _per_channel(key: str, value: Any, channels: int, *, positive: bool) -> tuple[float, ...]:
    """Mean or std as one float a channel: repeated from one value, or averaged from three for a grey model."""
    try:
        values = tuple(float(v) for v in (value if isinstance(value, Sequence) else [value]))
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"preprocessing: {key} must be numbers, not {value!r}") from error
    if len(values) == 1:
        values *= channels
    elif channels == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    if len(values) != channels or not np.isfinite(values).all() or (positive and min(values) <= 0):
        wanted = "positive numbers" if positive else "numbers"
        raise CalibrationError(f"preprocessing: {key} must be {channels} finite {wanted}, not {value!r}")
    return values


def _to_channels(image: Image, channels: int) -> Image:
    """The image as 8-bit RGB or grey. 16-bit files are scaled (PIL would clip them)."""
    from PIL import Image as module

    if image.mode.startswith("I;16"):
        image = module.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what PIL asks for; the colours are the same
    return image.convert("RGB" if channels == 3 else "L")


def stack(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Images (C, H, W) as one batch (N, C, H, W) of the dtype."""
    return torch.stack(list(rows)).to(dtype)
