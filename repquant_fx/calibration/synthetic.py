"""Inputs where there is no calibration data, made from the model itself.

| input | what is made |
|---|---|
| images | dead leaves (`dead_leaves`); of a classifier moved towards its classes (`class_prior`) |
| token ids of a causal language model | drawn from the model (`drawn_text`) |
| other token ids | random tokens of the vocabulary, within the special ones that the tokenizer or configuration names |
| masks, types | ones, zeros |
| anything else | standard normal, or small integers |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from repquant_fx import limits
from repquant_fx.calibration.class_prior import towards_classes
from repquant_fx.calibration.dead_leaves import dead_leaves
from repquant_fx.calibration.drawn_text import affordable, draw_text, random_tokens
from repquant_fx.calibration.images import DEFAULT_SIDE, mean_and_deviation
from repquant_fx.calibration.inputs import InputSpec, is_mask
from repquant_fx.calibration.text import Tokenization
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.errors import CalibrationError, InputError, first_line
from repquant_fx.frontends.capture import tensors_in

DEFAULT_LENGTH = 16
SAMPLES = 128  # images or sequences at most
MEASURED = (
    "on the two CIFAR-10 models of benchmarks/data_free.py (1,000 test images) such images lost up to 0.1 points of "
    "top-1 at W8A8 and 0.6 at W4A4 against real ones, and noise 41 to 60, but real data is better"
)
_IDS = 16
_KEPT = "inputs"
_FEWEST = _AT_ONCE = 8  # images; of those at once all activations are kept
_BUDGET = 4e11  # floating-point operations of one run over the images that are moved, STEPS times and back


@dataclass(frozen=True)
class Synthesis:
    """What inputs are made of.

    Attributes:
        inputs: of the model, in order.
        graph_module: the model; None where inputs must do without.
        preprocessing: timm data config of images.
        text: length and tokenizer of sequences.
        batch_size: samples at a time; `fixed`: the model takes no other number.
    """

    inputs: Sequence[InputSpec]
    graph_module: Callable[..., Any] | None
    preprocessing: Mapping[str, Any] | None
    text: Tokenization | None
    batch_size: int
    fixed: bool
    seed: int


@dataclass(frozen=True)
class Synthesised:
    """One tensor per input; what they are, in words; what a person must know of them; and whether the model was run."""

    columns: list[Tensor]
    origin: str
    notes: str
    from_model: bool = False


def synthesise(how: Synthesis, samples: int, cache: Checkpoint) -> Synthesised:
    """Inputs for a model, at most SAMPLES where they are images or sequences; those of the cache where it has them.

    What was not made from the model is quickly made again, and not kept.

    Raises:
        CalibrationError: an input has no batch dimension.
        InputError: the inputs do not fit into memory.
    """
    if (kept := cache.load(_KEPT)) is not None:
        origin, notes = bytes(kept["words"].tolist()).decode().split("\n")
        return Synthesised([kept[str(i)] for i in range(len(how.inputs))], origin, notes)
    made = _make(how, samples)
    if made.from_model:
        words = torch.tensor(list(f"{made.origin}\n{made.notes}".encode()), dtype=torch.uint8)
        cache.save(_KEPT, {"words": words, **{str(i): column for i, column in enumerate(made.columns)}})
    return made


def _make(how: Synthesis, samples: int) -> Synthesised:
    generator = torch.Generator().manual_seed(how.seed)
    images = [spec for spec in how.inputs if _is_image(spec, how.preprocessing)]
    ids = [spec for spec in how.inputs if _is_ids(spec)] if how.text is not None else []
    if images or ids:
        samples = min(samples, SAMPLES)
    if images and len(how.inputs) == 1:
        return _images_alone(how, samples, generator)
    if how.text is not None and how.text.causal and sum(not is_mask(spec) for spec in how.inputs) == len(ids) == 1:
        return _own_text(how, ids[0], samples, generator)
    columns = [_plain(spec, how, samples, generator) for spec in how.inputs]
    kinds = [*(["images of dead leaves"] if images else []), *(["random tokens"] if ids else [])]
    if not kinds:
        return Synthesised(columns, "random inputs", "the ranges come from random inputs, and accuracy will suffer")
    made = " and ".join(kinds)
    return Synthesised(columns, f"{samples} samples of {made}", f"the ranges come from {made}, and accuracy may suffer")


def _images_alone(how: Synthesis, samples: int, generator: torch.Generator) -> Synthesised:
    """Images of a model that takes nothing else."""
    (spec,) = how.inputs
    images, made = _plain(spec, how, samples, generator), f"{samples} images of dead leaves"
    try:
        moved = _moved(how, images, generator)
    except InputError:
        raise
    except Exception as error:  # whatever runs backwards through a stranger's model
        reason = f"not moved towards the model's classes ({first_line(error)})"
        return Synthesised([images], made, f"the ranges come from {made}, {reason}, and accuracy may suffer")
    images[:len(moved)] = moved
    made += f", {len(moved)} of them moved towards the model's classes"
    return Synthesised([images], made, f"the ranges come from {made}; {MEASURED}", True)


def _moved(how: Synthesis, images: Tensor, generator: torch.Generator) -> Tensor:
    """As many of the images as are worth the time, moved towards the model's classes."""
    if how.graph_module is None:
        raise ValueError("there is no model")
    batch = how.batch_size if how.fixed else min(len(images), _AT_ONCE)
    if len(images) < batch:
        raise ValueError(f"it takes {batch} images at a time")
    fits = int(_BUDGET / max(1.0, _flops(how.graph_module, images[:batch]) / batch))
    count = min(len(images), max(fits, _FEWEST))
    count = max(1, count // batch) * batch if how.fixed else count
    mean, deviation = (t.to(images.dtype) for t in mean_and_deviation(how.preprocessing, images.shape[1]))
    return towards_classes(how.graph_module, images[:count], (0 - mean) / deviation, (1 - mean) / deviation, generator,
                           batch)


def _own_text(how: Synthesis, spec: InputSpec, samples: int, generator: torch.Generator) -> Synthesised:
    """Sequences that a causal language model draws itself."""
    try:
        ids = _drawn(how, spec, samples, generator)
    except InputError:
        raise
    except Exception as error:  # see `_images_alone`
        columns = [_plain(each, how, samples, generator) for each in how.inputs]
        reason = f"nothing could be drawn from the model ({first_line(error)})"
        return Synthesised(columns, "random tokens", f"the ranges come from random tokens, for {reason}, and accuracy "
                           "will suffer")
    made = f"{len(ids)} sequences of {ids.shape[1]} tokens that the model drew itself"
    columns = [ids.to(spec.dtype) if each is spec else torch.ones(ids.shape, dtype=each.dtype) for each in how.inputs]
    return Synthesised(columns, made, f"the ranges come from {made}; what that costs was not measured", True)


def _drawn(how: Synthesis, spec: InputSpec, samples: int, generator: torch.Generator) -> Tensor:
    model, text = how.graph_module, how.text
    if model is None or text is None:
        raise ValueError("there is no model")
    masks = [None if each is spec else each.dtype for each in how.inputs]

    @torch.no_grad()
    def scores(ids: Tensor) -> Tensor:
        given = [ids.to(spec.dtype) if dtype is None else torch.ones(ids.shape, dtype=dtype) for dtype in masks]
        logits = [t for t in tensors_in(model(*given)) if t.ndim == 3 and t.shape[:2] == ids.shape]
        if not logits or logits[0].shape[2] < (spec.below or 2):
            raise ValueError("it gives no logits of its vocabulary")
        return logits[0]

    fixed = spec.shape[1]
    batch = how.batch_size
    trial = torch.zeros(batch if how.fixed else 2, fixed or 2, dtype=torch.int64)
    vocabulary = spec.below or scores(trial).shape[2]
    samples, length = affordable(samples, fixed or text.length, _flops(scores, trial) / trial.numel())
    if how.fixed:
        samples = max(1, samples // batch) * batch
    return draw_text(scores, samples, fixed or length, text.frame.begin, generator, vocabulary, batch,
                     fixed_length=fixed is not None)


def _flops(model: Any, batch: Tensor) -> float:
    """Floating-point operations of one run."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    return float(counter.get_total_flops())


def _plain(spec: InputSpec, how: Synthesis, samples: int, generator: torch.Generator) -> Tensor:
    """Samples of one input without a look at the model; free dimensions get the side of an image, or the length."""
    if not spec.shape:
        raise CalibrationError(f"input {spec.name} has no batch dimension, so no inputs can be made up for it")
    length = how.text.length if how.text is not None else DEFAULT_LENGTH
    size = _sides(spec, how.preprocessing)
    shape = [samples, *(d if d is not None else length for d in size)]
    limits.check_size(shape, f"made-up input {spec.name}", spec.dtype.itemsize)
    if _is_image(spec, how.preprocessing):
        mean, deviation = mean_and_deviation(how.preprocessing, shape[1])
        leaves = torch.stack([dead_leaves((shape[1], shape[2], shape[3]), generator) for _ in range(samples)])
        return ((leaves - mean) / deviation).to(spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool or is_mask(spec):
        return torch.ones(shape, dtype=spec.dtype)
    if "type" in spec.name.lower():
        return torch.zeros(shape, dtype=spec.dtype)
    if _is_ids(spec) and how.text is not None and spec.below:
        return random_tokens(samples, shape[1], how.text.frame, spec.below, generator).to(spec.dtype)
    return torch.randint(0, spec.below or _IDS, shape, generator=generator).to(spec.dtype)


def _sides(spec: InputSpec, preprocessing: Mapping[str, Any] | None) -> Sequence[int | None]:
    """The shape without the batch; free sides of an image as the preprocessing makes them."""
    size: Sequence[int | None] = spec.shape[1:]
    if len(spec.shape) == 4 and spec.dtype.is_floating_point and None in size:
        stored = (preprocessing or {}).get("input_size") or (3, DEFAULT_SIDE, DEFAULT_SIDE)
        size = [own if own is not None else int(other) for own, other in zip(size, stored)]
    return size


def _is_image(spec: InputSpec, preprocessing: Mapping[str, Any] | None) -> bool:
    """Whether an input is what image files give: three axes, of 1 or 3 channels."""
    return len(spec.shape) == 4 and spec.dtype.is_floating_point and _sides(spec, preprocessing)[0] in (1, 3)


def _is_ids(spec: InputSpec) -> bool:
    return len(spec.shape) == 2 and not spec.dtype.is_floating_point and not is_mask(spec) \
        and spec.dtype != torch.bool and "type" not in spec.name.lower()
