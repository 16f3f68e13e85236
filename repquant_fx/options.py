"""What a run is given, as objects that travel together: the model's source, the data it is run on, how to run.

People give the same names flat to `compile` and `evaluate`, where each is described. Nothing here imports torch: the
command line makes these objects before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repquant_fx.targets import DEFAULT

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A model, and what it takes to load it; the arguments of `compile` of these names."""

    model: Any
    arch: str | None = None
    input_shape: Sequence[int] | None = None
    allow_pickle: bool = False
    task: str | None = None
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None
    offload_dir: str | Path | None = None
    module: str | None = None


@dataclass(frozen=True)
class Calibration:
    """The data that a model is run on; `data` is the argument `calibration` of `compile`, the others are of its names.

    `tokenizer` is a directory or one of transformers; `seed` makes every random choice.
    """

    data: Any = None
    samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    seq_len: int | None = None
    tokenizer: Any | None = None


@dataclass(frozen=True)
class Run:
    """Where and how a compile works, and for whom; the arguments of `compile` of these names."""

    check: bool = True
    work_dir: str | Path | None = None
    distributed: bool = False
    device: str | torch.device = "cpu"
    statistics: bool = False
    target: str = DEFAULT
    opset: int | None = None
    with_past: bool | None = None
    external_data: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured on, and how; the arguments of `evaluate` of these names."""

    data: str | Path
    metric: str | None = None
    batch_size: int | None = None
    limit: int | None = None
    threads: int | None = None
    seed: int = 0
    tokenizer: str | None = None
    seq_len: int | None = None
    stride: int | None = None
    separator: str | None = None
    prompts: str | None = None
    coco: str | Path | None = None
    boxes: str | Path | None = None
    modules: Mapping[str, str] | None = None


def from_keywords(model: Any, calibration: Any, keywords: Mapping[str, Any]) -> tuple[Source, Calibration]:
    """The two objects from what a function for people was given: a model, data, and keywords that `compile` takes, too.

    Raises:
        TypeError: a keyword is a field of neither.
    """
    of_source = {field.name for field in fields(Source)}
    named = {name: value for name, value in keywords.items() if name in of_source}
    return Source(model, **named), Calibration(calibration, **{k: v for k, v in keywords.items() if k not in named})
