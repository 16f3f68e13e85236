"""Image processors of transformers as preprocessing that timm knows."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repquant_fx.errors import InputError, RepQuantWarning, first_line
from repquant_fx.frontends.directory import CONFIG, ModelDirectory, find_files, staged
from repquant_fx.frontends.offline import library, quiet_offline
from repquant_fx.frontends.screening import screen

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MOST_BYTES = 1 << 20
_SOUNDS = "feature_extractor"  # within a processor_config.json


def features_shape(folder: Path | ModelDirectory) -> tuple[int, int] | None:
    """(features, frames) that the feature extractor of a directory makes of a sound; None where nothing says so.

    Raises:
        InputError: it names code or other files.
    """
    described = [part for found in _described(folder) for part in (found, found.get(_SOUNDS))]
    for each in (part for part in described if isinstance(part, dict)):
        features, frames = each.get("feature_size"), each.get("nb_max_frames")
        if isinstance(features, int) and isinstance(frames, int) and features > 0 and frames > 0:
            return features, frames
    return None


def _described(folder: Path | ModelDirectory) -> list[dict[str, Any]]:
    path = folder.path if isinstance(folder, ModelDirectory) else folder
    names = [name for name in _PROCESSORS if (path / name).is_file()]
    files = find_files(folder) if names else None
    found = [screen(files.json(name, _MOST_BYTES), str(path / name)) for name in names if files is not None]
    return [each for each in found if isinstance(each, dict)]


def _is_for_sounds(described: dict[str, Any]) -> bool:
    return (_SOUNDS in described or "feature_size" in described) and not any("image_proc" in key for key in described)


def load_preprocessing(folder: Path | ModelDirectory, expected: Sequence[int] | None) -> dict[str, Any] | None:
    """The image processor of a directory as a timm data config; None where there is none.

    Args:
        expected: (C, H, W) that the model was built for, used where the processor does not lead to one size.

    Raises:
        InputError: it names code or other files, or sizes that nothing has.

    Warns:
        RepQuantWarning: it cannot be read; or its resizing has no counterpart, and the images are resized to the
            model's size instead.
    """
    path = folder.path if isinstance(folder, ModelDirectory) else folder
    if not any((path / name).is_file() for name in _PROCESSORS) or all(map(_is_for_sounds, _described(folder))):
        return None
    files = find_files(folder)
    try:
        contents = {
            name: json.dumps(screen(files.json(name, _MOST_BYTES), str(path / name))).encode()
            for name in _PROCESSORS
            if files.has(name)
        }
        if files.has(CONFIG):
            contents[CONFIG] = json.dumps(screen(files.json(CONFIG), str(path / CONFIG))).encode()
        with staged(contents) as private, quiet_offline():
            processor = library().AutoImageProcessor.from_pretrained(
                private, local_files_only=True, trust_remote_code=False
            )
        return preprocessing_of(processor, expected)
    except InputError:
        raise
    except Exception as error:
        warnings.warn(
            f"the image processor of {path} cannot be read ({first_line(error)}); images will get the default "
            "preprocessing",
            RepQuantWarning,
            stacklevel=3,
        )
        return None


def preprocessing_of(processor: Any, expected: Sequence[int] | None) -> dict[str, Any] | None:
    """A transformers image processor as a timm data config; see `load_preprocessing`."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    resized = dict(get("size", {})) if get("do_resize", True) else {}
    cropped = dict(get("crop_size", {})) if get("do_center_crop", False) else {}
    height, width = resized.get("height"), resized.get("width")
    edge = height if height == width else None
    edge = edge or (resized.get("shortest_edge") if not resized.get("longest_edge") else None)
    size: tuple[int, int]
    if cropped.get("height") and edge:
        size, mode, share = (
            (cropped["height"], cropped["width"]),
            "squash" if height else "center",
            cropped["height"] / edge,
        )
    elif height and width:
        size, mode, share = (height, width), "squash", 1.0
    else:
        if expected is None:
            return None
        warnings.warn(
            f"the model's image processor resizes to {dict(get('size', {}))}, which does not lead to one size; images "
            f"are resized to {expected[1]}x{expected[2]} as a whole",
            RepQuantWarning,
            stacklevel=3,
        )
        size, mode, share = (expected[1], expected[2]), "squash", 1.0
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"its size is {size}")
    channels = expected[0] if expected is not None else 3
    # the processor computes (pixel * factor - mean) / std of 0..255, timm the same of 0..1
    factor = 255 * float(get("rescale_factor", 1 / 255)) if get("do_rescale", True) else 255.0
    mean, std = (get("image_mean", [0.0]), get("image_std", [1.0])) if get("do_normalize", True) else ([0.0], [1.0])
    return {
        "input_size": [channels, *size],
        "interpolation": _interpolation(get("resample")),
        "crop_pct": share,
        "crop_mode": mode,
        "mean": [float(m) / factor for m in _listed(mean, channels)],
        "std": [float(s) / factor for s in _listed(std, channels)],
    }


def _interpolation(resample: Any) -> str:
    """timm's word for PIL's filter number."""
    return {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}.get(
        int(resample) if isinstance(resample, int) else -1, "bicubic"
    )


def _listed(value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values
