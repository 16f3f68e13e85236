"""What a transformers model takes and gives: inputs by name, free axes, the outputs that count, the modules that stay
float.

All of it is read from the signature of `forward`, the configuration and one run on example inputs; no model is known by
name.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from repquant_fx import limits
from repquant_fx.calibration.drawn_text import Frame
from repquant_fx.errors import InputError, first_line
from repquant_fx.frontends.architectures import BATCH, config_image_shape
from repquant_fx.frontends.tasks import GENERAL, TASKS, WRITING, task_of

TEXT_LENGTH = 128  # tokens of an example and of a calibration sequence, where the model takes so many
TARGET_LENGTH = 48  # of an example of what a decoder writes; of another length, so that neither is taken for the other
TARGET, TARGET_SEQUENCE = "decoder_input_ids", "decoder_sequence"
_SEED = 0
_PRODUCTS_OF_THE_ROOT = "matmul*"  # a product outside all modules goes by the name of its node
_INPUTS = ("input_ids", "attention_mask", "pixel_values", "input_features", "input_points")


@dataclass(frozen=True)
class Signature:
    """See `loading.LoadedModel`, whose fields these become."""

    example_inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    dynamic_axes: tuple[dict[int, str], ...]
    outputs: tuple[str, ...]
    float_modules: tuple[str, ...]
    task: str


def is_transformers(module: object) -> bool:
    """Whether a module is a model of transformers; does not import the library."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


def stateless(model: nn.Module) -> nn.Module:
    """A copy that shares the tensors, keeps no key/value cache and gives its outputs by name; the original is left as
    it is.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: nn.Module = copy.deepcopy(model, shared)
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
        if getattr(config, "return_dict", True) is False:
            config.return_dict = True
    return copied.eval()


def vocabulary(module: object) -> int | None:
    """Number of token ids that a transformers text model knows; None for any other module."""
    size = getattr(text_config(module), "vocab_size", None) if is_transformers(module) else None
    return size if isinstance(size, int) and size > 0 else None


def frame(module: object) -> Frame:
    """The special tokens that a transformers configuration names; none where it names none."""
    config, size = text_config(module) if is_transformers(module) else None, vocabulary(module)
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep")}
    known = {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < (size or 0)}
    begin, end = (tuple(known[name] for name in names if name in known) for names in (("bos",), ("eos",)))
    return Frame(begin, end, frozenset(known.values()))


def positions(module: object) -> int | None:
    """Longest sequence that a transformers text model was built for, in tokens; None where it does not say."""
    size = getattr(text_config(module), "max_position_embeddings", None) if is_transformers(module) else None
    if not isinstance(size, int) or size < 1:
        return None
    for name, table in cast(nn.Module, module).named_modules():  # one with a padding entry begins to count after it
        if (
            isinstance(table, nn.Embedding)
            and "position" in name
            and table.num_embeddings == size
            and table.padding_idx is not None
        ):
            return size - table.padding_idx - 1
    return size


def can_write(model: Any, config: Any, task: str | None) -> bool:
    """Whether a model, or a class of models, of transformers is an encoder-decoder that generates, and is used as one.

    Args:
        task: one of `tasks.TASKS`: some serve others, which leave the decoder alone.
    """
    able = getattr(model, "can_generate", None)
    return bool(getattr(config, "is_encoder_decoder", False) and able is not None and able()
                and task in (*WRITING, GENERAL, None))


def decoder_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder."""
    inner = getattr(config, "decoder", None)
    return inner if hasattr(inner, "vocab_size") else config


def target_vocabulary(config: Any) -> int:
    """Number of token ids that the decoder knows.

    Raises:
        InputError: the configuration does not say.
    """
    size = getattr(decoder_config(config), "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"a decoder writes tokens, but the configuration of {config.model_type!r} has no vocab_size")
    return size


def longest_target(config: Any) -> int | None:
    """Tokens that the decoder was built for; None where it does not say."""
    described = decoder_config(config)
    sizes = [getattr(described, name, None) for name in ("max_target_positions", "max_position_embeddings")]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def read_signature(model: nn.Module, *, input_shape: Sequence[int] | None = None, task: str | None = None,
                   image_size: Sequence[int] | None = None, features: Sequence[int] | None = None) -> Signature:
    """Inputs, free axes, outputs and float modules of a transformers model.

    Args:
        model: see `stateless`.
        input_shape: WITHOUT the batch: (C, H, W) for the images, (length,) for the text, (features, frames) for sounds.
            Overrides what the model says.
        task: decides which outputs are kept; by the model's class where None.
        image_size: (C, H, W) that the model's preprocessing gives.
        features: (features, frames) that it gives of sounds.

    Raises:
        InputError: the model takes something that is neither text nor an image, or does not run on the inputs made up
            for it.
    """
    task = task or task_of(type(model).__name__)
    names = _input_names(model, task)
    generator = torch.Generator().manual_seed(_SEED)
    independent = {"input_ids", "pixel_values"} <= set(names) and "input_points" not in names
    for texts in ((BATCH + 1, BATCH) if independent else (BATCH,)):
        inputs = _examples(model, names, input_shape, image_size, features, texts, generator)
        try:
            fields, float_modules = _run(model, dict(zip(names, inputs)))
        except InputError:
            if texts == BATCH:
                raise
            continue
        break
    axes = tuple(free_axes(name, texts != BATCH) for name in names)
    if texts != BATCH:  # each text is compared with each image: a similarity, no layer
        float_modules = (*float_modules, _PRODUCTS_OF_THE_ROOT)
    wanted = tuple(field for field in TASKS[task].outputs if field in fields)
    return Signature(inputs, names, axes, wanted or fields, float_modules, task)


def _input_names(model: nn.Module, task: str) -> tuple[str, ...]:
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    names = tuple(
        name for name in _INPUTS if name in parameters and (name != "attention_mask" or "input_ids" in parameters)
    )
    if main not in names:
        raise InputError(
            f"{type(model).__name__} takes {main}, for which no example can be made up; save it with torch.export.save "
            "(.pt2), or pass example_inputs to repquant_fx.compile"
        )
    return (*names, TARGET) if can_write(model, getattr(model, "config", None), task) else names


def _examples(
    model: nn.Module,
    names: tuple[str, ...],
    input_shape: Sequence[int] | None,
    image_size: Sequence[int] | None,
    features: Sequence[int] | None,
    texts: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Ids are drawn from the whole vocabulary; the first text is padded.

    On the right: a causal model's row that sees nothing but padding on its left has no defined value to compare.
    """
    given = tuple(int(size) for size in input_shape) if input_shape is not None else None
    if given is not None and not all(size > 0 for size in given):
        raise InputError(
            f"--input-shape {given}: expected positive sizes without the batch dimension, such as 3 224 224"
        )
    made: dict[str, Tensor] = {}
    if "input_ids" in names:
        length = (
            given[0] if given is not None and len(given) == 1 else min(TEXT_LENGTH, positions(model) or TEXT_LENGTH)
        )
        known = vocabulary(model)
        if known is None:
            raise InputError(f"{type(model).__name__} takes input_ids but its configuration has no vocab_size")
        limits.check_size((texts, length), "an example input_ids", itemsize=8)
        made["input_ids"] = torch.randint(0, known, (texts, length), generator=generator)
        mask = torch.ones(texts, length, dtype=torch.int64)
        mask[0, length - length // 4:] = 0
        made["attention_mask"] = mask
    if "pixel_values" in names:
        shape = given if given is not None and len(given) == 3 else image_size or config_image_shape(model)
        if shape is None:
            raise InputError(
                f"{type(model).__name__} does not say what images it takes; pass --input-shape without the batch "
                "dimension, such as 3,224,224"
            )
        limits.check_size((BATCH, *shape), "an example pixel_values")
        made["pixel_values"] = torch.randn(BATCH, *shape, generator=generator)
        # in pixels: 1 object, 2 clicks
        made["input_points"] = torch.rand(BATCH, 1, 2, 2, generator=generator) * min(shape[1:])
    if "input_features" in names:
        sounds = given if given is not None and len(given) == 2 else features
        if sounds is None:
            raise InputError(f"{type(model).__name__} does not say what sounds it takes; pass --input-shape, features "
                             "and frames without the batch dimension, such as 80,3000")
        limits.check_size((BATCH, *sounds), "an example input_features")
        made["input_features"] = torch.randn(BATCH, *sounds, generator=generator)
    if given is not None and len(given) not in [tensor.ndim - 1 for tensor in made.values()]:
        raise InputError(
            f"--input-shape {given}: {type(model).__name__} takes {', '.join(names)}; give (length,) for text, (C, H, "
            "W) for images, (features, frames) for sounds, without the batch"
        )
    if TARGET in names:
        config: Any = model.config
        tokens, known = min(TARGET_LENGTH, longest_target(config) or TARGET_LENGTH), target_vocabulary(config)
        made[TARGET] = torch.randint(0, known, (texts, tokens), generator=generator)
    return tuple(made[name] for name in names)


def free_axes(name: str, independent: bool = False) -> dict[int, str]:
    """The free axes of an input by its name. Texts and images are counted apart where the model compares each with
    each.
    """
    if name == TARGET:
        return {0: "batch", 1: TARGET_SEQUENCE}
    if name in ("input_ids", "attention_mask"):
        return {0: "text_batch" if independent else "batch", 1: "sequence"}
    return {0: "batch"}


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fields of the output that are tensors, globs of the modules that stay float).

    A model that is prompted with points reads each image once and decodes it many times: the method is for the module
    that reads the image, the small decoders beside it stay float.
    """
    readers: set[str] = set()
    images = inputs.get("pixel_values")

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(value is images for value in (*args, *kwargs.values())):
                readers.add(name)
        return note

    hooks = [child.register_forward_pre_hook(watch(name), with_kwargs=True) for name, child in model.named_children()]
    try:
        with torch.no_grad():
            result = model(**inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise InputError(f"{type(model).__name__} does not run on {shapes}: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    fields = tuple(key for key, value in result.items() if isinstance(value, Tensor))
    if "input_points" not in inputs or not readers:
        return fields, ()
    return fields, tuple(
        glob for name, _ in model.named_children() if name not in readers for glob in (name, f"{name}.*")
    )


def text_config(module: object) -> Any:
    """The part of a configuration that describes text; None where there is no configuration."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "text_config", None) or config
