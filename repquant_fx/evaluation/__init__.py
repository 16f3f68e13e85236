"""How good is a model? Float models in torch, quantized and other ONNX files in ONNX Runtime, measured by the same
code.

| metric | of | data |
|---|---|---|
| accuracy | image classifiers | class folders of images, or arrays with labels |
| perplexity | causal language models | text |
| similarity | sentence encoders | pairs of sentences with scores |
| zero-shot | models of texts and images | class folders of images, and prompts |
| detection | object detectors | a folder of images, and annotations in COCO's format |
| box-prompts | models that draw masks for boxes | the same, and the boxes of a detector |

Zero-shot tasks of language models are `harness`, which needs the package lm_eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from repquant_fx.errors import InputError
from repquant_fx.evaluation.box_prompts import box_prompts, open_prompted
from repquant_fx.evaluation.classification import Accuracy, accuracy, accuracy_of, labelled_folder
from repquant_fx.evaluation.coco import AveragePrecision
from repquant_fx.evaluation.detection import detection, open_detector
from repquant_fx.evaluation.perplexity import Perplexity, perplexity
from repquant_fx.evaluation.runners import Runner, open_runner, preprocessing_from_onnx, torch_threads
from repquant_fx.evaluation.similarity import PAIR_SUFFIXES, Similarity, similarity
from repquant_fx.evaluation.zero_shot import zero_shot
from repquant_fx.files import irregular
from repquant_fx.options import Evaluation, Source

__all__ = [
    "METRICS",
    "Accuracy",
    "AveragePrecision",
    "Perplexity",
    "Result",
    "Runner",
    "Similarity",
    "accuracy",
    "accuracy_of",
    "box_prompts",
    "deduce_metric",
    "detection",
    "evaluate",
    "labelled_folder",
    "measure",
    "open_runner",
    "perplexity",
    "preprocessing_from_onnx",
    "similarity",
    "zero_shot",
]

Result: TypeAlias = Accuracy | Perplexity | Similarity | AveragePrecision


@dataclass(frozen=True)
class Metric:
    """One way to measure.

    Attributes:
        measure: (runner, data, batch_size=, limit=, options) to a result.
        task: that a transformers directory is built for; None leaves it to its configuration.
        batch_size: by default; a window of text fills a machine, an image does not.
        options: of `evaluate` that belong to it.
        folders: whether the data is a folder.
        opens: (source, threads, modules) to what `measure` takes.
    """

    measure: Callable[..., Result]
    task: str | None
    batch_size: int
    options: tuple[str, ...]
    folders: bool
    opens: Callable[..., Any] = open_runner


METRICS = {
    "accuracy": Metric(accuracy, None, 64, ("seed",), True),
    "perplexity": Metric(perplexity, None, 1, ("tokenizer", "seq_len", "stride", "separator"), False),
    "similarity": Metric(similarity, "feature-extraction", 64, ("seed", "tokenizer", "seq_len"), False),
    "zero-shot": Metric(zero_shot, None, 64, ("seed", "tokenizer", "seq_len", "prompts"), True),
    "detection": Metric(detection, None, 1, ("seed", "coco"), True, open_detector),
    "box-prompts": Metric(box_prompts, None, 1, ("seed", "coco", "boxes"), True, open_prompted),
}
_NEEDS = {
    "zero-shot": ("prompts", "a JSON file of class prompts, or a template such as 'a photo of a {}'"),
    "detection": ("coco", "annotations in COCO's format, such as instances_val2017.json"),
    "box-prompts": ("coco", "annotations in COCO's format, such as instances_val2017.json"),
}
_OPTIONS = ("tokenizer", "seq_len", "stride", "separator", "prompts", "coco", "boxes")
_ARRAYS = (".npz", ".safetensors")


def evaluate(
    source: str,
    data: str,
    *,
    metric: str | None = None,
    arch: str | None = None,
    allow_pickle: bool = False,
    batch_size: int | None = None,
    limit: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    separator: str | None = None,
    prompts: str | None = None,
    coco: str | Path | None = None,
    boxes: str | Path | None = None,
    modules: Mapping[str, str] | None = None,
) -> Result:
    """Measure a model. Long because it says what every argument is.

    Args:
        source: an ONNX file, run by ONNX Runtime; or anything `load_model` takes, run by torch.
        data: see the metrics' own functions.
        metric: one of METRICS; by the data where None (see `deduce_metric`).
        arch: architecture of a bare state dict.
        allow_pickle: the user trusts the file of `source`; it may execute code.
        batch_size: images, sentences or windows at a time (64, 64 and 1 where None); a model with a fixed batch
            overrides it.
        limit: evaluate a seeded random subset of this many images or pairs, or the first so many windows of a text.
        threads: of the runtime; None leaves the choice to it.
        seed: of the subset.
        tokenizer: directory of a transformers tokenizer; the one beside the model where None.
        seq_len, stride, separator: of texts; see `perplexity`. seq_len also cuts sentences and prompts.
        prompts: of classes; see `zero_shot.read_prompts`.
        coco: annotations of the images in `data`; see `coco.read_annotations`.
        boxes: of a detector, for box-prompts; see `box_prompts.read_prompts`.
        modules: compiled files that run in place of modules of a torch model, by their paths.

    Raises:
        InputError: data or model cannot be used, do not fit together, or an option does not belong to the metric.
    """
    return measure(Source(source, arch, allow_pickle=allow_pickle),
                   Evaluation(data, metric, batch_size, limit, threads, seed, tokenizer, seq_len, stride, separator,
                              prompts, coco, boxes, modules))


def measure(source: Source, how: Evaluation) -> Result:
    """`evaluate`, of what it was given as objects.

    Raises:
        InputError: as `evaluate` does.
    """
    threads = how.threads
    if any(count is not None and count < 1 for count in (how.batch_size, how.limit, threads)):
        raise InputError("batch size, limit and threads must be at least 1")
    if threads is not None and threads > (most := max(64, 8 * (os.cpu_count() or 1))):
        raise InputError(f"{threads} threads: this machine runs {most} at most")
    path = _data(how.data)
    name = how.metric or deduce_metric(path, how.prompts, how.coco, how.boxes)
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}")
    chosen = METRICS[name]
    options: dict[str, Any] = {key: value for key in _OPTIONS if (value := getattr(how, key)) is not None}
    stray = [f"--{key.replace('_', '-')}" for key in options if key not in chosen.options]
    if stray:
        raise InputError(f"{', '.join(stray)} does not belong to the metric {name}")
    if name in _NEEDS and _NEEDS[name][0] not in options:
        raise InputError(f"{name} needs --{_NEEDS[name][0]}: {_NEEDS[name][1]}")
    if path.is_dir() != chosen.folders and not (name == "accuracy" and path.suffix.lower() in _ARRAYS):
        kind = "a folder" if "coco" in chosen.options else "class folders"
        arrays = ", or a .npz or .safetensors" if name == "accuracy" else ""
        wanted = f"expected {kind} of images{arrays}" if chosen.folders else f"{name} needs a file, not a folder"
        raise InputError(f"evaluation data {path}: {wanted}")
    if "seed" in chosen.options:
        options["seed"] = how.seed
    with torch_threads(threads):
        model = chosen.opens(replace(source, task=chosen.task), threads, how.modules)
        return chosen.measure(model, path, batch_size=how.batch_size or chosen.batch_size, limit=how.limit, **options)


def _data(given: str | Path) -> Path:
    path = Path(given).expanduser()
    if not path.exists():
        raise InputError(f"evaluation data {path} does not exist: give class folders of images, a .npz or .safetensors "
                         "with images and labels, a text, or sentence pairs")
    if kind := irregular(path):
        raise InputError(f"evaluation data {path} is {kind}, not a file")
    return path


def deduce_metric(
    data: Path, prompts: str | None = None, coco: str | Path | None = None, boxes: str | Path | None = None
) -> str:
    """By what is given beside the data: zero-shot for prompts, box-prompts for boxes, detection for annotations. Else
    by the data: accuracy for folders and arrays, similarity for .csv, .tsv and .jsonl, perplexity for any other
    file.
    """
    for given, name in ((prompts, "zero-shot"), (boxes, "box-prompts"), (coco, "detection")):
        if given is not None:
            return name
    if data.is_dir() or data.suffix.lower() in _ARRAYS:
        return "accuracy"
    return "similarity" if data.suffix.lower() in PAIR_SUFFIXES else "perplexity"
