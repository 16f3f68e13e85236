"""Named architectures, and what a module of a known library takes as input: `timm:NAME,key=value`, `torchvision:NAME`.

Nothing here touches the network unless the specification says `pretrained`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError

BATCH = 2  # torch.export takes a dimension of 1 for a constant
_LARGEST = 1_000_000  # of a number in an architecture: classes, pixels, channels, layers
_SEED = 0
# Arguments of timm.create_model that read other files or the hub.
FORBIDDEN = ("checkpoint_path", "pretrained_cfg", "cache_dir")
_PREPROCESSING = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


@dataclass(frozen=True)
class Architecture:
    """A parsed specification: `library:name,key=value,pretrained`."""

    library: str
    name: str
    options: dict[str, Any]
    pretrained: bool

    def __str__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self.options.items()] + ["pretrained"] * self.pretrained
        return f"{self.library}:{','.join([self.name, *options])}"


def is_architecture(source: str) -> bool:
    """Whether a source names an architecture and not a file."""
    return bool(re.match(r"(timm|torchvision):", source))


def parse_architecture(text: str) -> Architecture:
    """Parse `timm:NAME,key=value,...`; values are Python literals, a bare word is a string.

    Raises:
        ModelFileError: another library, a malformed option, or an option that would read files or the hub.
    """
    library, _, rest = text.partition(":")
    if library not in ("timm", "torchvision") or not rest:
        raise ModelFileError(f"architecture {text!r}: expected timm:NAME or torchvision:NAME, for example "
                             "timm:vit_tiny_patch16_224,img_size=64")
    name, *parts = _split(rest, text)
    options: dict[str, Any] = {}
    pretrained = False
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if part.strip() == "pretrained":
            pretrained = True
        elif key == "pretrained" and value in ("True", "False"):
            pretrained = value == "True"
        elif not equals or not key.isidentifier() or not value:
            raise ModelFileError(f"architecture {text!r}: {part.strip()!r} is neither key=value nor 'pretrained'")
        elif key == "pretrained_cfg_overlay":
            options[key] = _preprocessing_overlay(_value(value, text), text)
        elif key in FORBIDDEN:
            raise ModelFileError(f"architecture {text!r}: {key} is not accepted, because it reads other files; "
                                 "give the weights as the model file and the architecture as --arch")
        else:
            options[key] = _value(value, text)
    _check_numbers(options, f"architecture {text[:80]!r}")
    return Architecture(library, name.strip(), options, pretrained)


def _check_numbers(value: Any, entry: str) -> None:
    """Refuse a number that no architecture has: some make a list of that length before there is a model to measure."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_numbers(each, entry)
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ModelFileError(f"{entry} is too large: {str(value)[:40]} is more than any model has ({_LARGEST})")


def build(architecture: Architecture) -> nn.Module:
    """The module, in eval mode, with its default initialisation (or the pretrained weights where the specification says
    so).

    Raises:
        ModelFileError: unknown name (with close matches), unknown option, or options the model rejects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if architecture.options:  # they can ask for any size
                skeleton(architecture)
            with limits.bounded_modules(str(architecture)):
                return _creator(architecture)(architecture).eval()
    except InputError:
        raise
    except ImportError as error:
        raise ModelFileError(
            f"{architecture} needs {architecture.library}: pip install 'repquant-fx[vision]'"
        ) from error
    except TypeError as error:
        raise ModelFileError(f"{architecture}: {_unknown_keyword(error) or error}") from error
    except Exception as error:
        action = "cannot be downloaded or built" if architecture.pretrained else "cannot be built"
        raise ModelFileError(f"{architecture} {action}: {str(error)[:300] or type(error).__name__}") from error


def example_inputs(module: nn.Module, input_shape: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Deterministic inputs with batch 2, one normal float tensor. (`signature` makes those of transformers models.)

    Args:
        module: a timm or torchvision module, or any module where `input_shape` is given.
        input_shape: WITHOUT the batch dimension, such as (C, H, W). Overrides what the model says.

    Raises:
        InputError: the shape is malformed, or neither the module nor `input_shape` tells it.
    """
    if input_shape is not None and (not input_shape or any(int(size) < 1 for size in input_shape)):
        raise InputError(f"--input-shape {tuple(input_shape)}: expected positive sizes without the batch dimension, "
                         "such as 3 224 224")
    given = None if input_shape is None else tuple(int(size) for size in input_shape)
    shape = (BATCH, *(given or _image_shape(module)))
    limits.check_size(shape, "an example input")
    return (torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)),)


def preprocessing(module: nn.Module) -> dict[str, Any] | None:
    """How to prepare images: input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode; JSON types only.

    From timm's configuration; for a transformers vision model its image size and mean = std = 0.5; None where nothing
    is known.
    """
    if isinstance(getattr(module, "pretrained_cfg", None), dict):
        from timm.data import resolve_data_config

        config = resolve_data_config({"input_size": _timm_shape(module)}, model=module)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    shape = config_image_shape(module)
    if shape is None:
        return None
    half = [0.5] * shape[0]
    return {"input_size": list(shape), "interpolation": "bicubic", "mean": half, "std": half, "crop_pct": 1.0,
            "crop_mode": "center"}


def _split(text: str, whole: str) -> list[str]:
    """Split at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise ModelFileError(f"architecture {whole!r}: unbalanced brackets or quotes")
    return parts


def _value(text: str, whole: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if re.fullmatch(r"[A-Za-z_][\w.\-]*", text):
            return text
    raise ModelFileError(f"architecture {whole!r}: {text!r} is not a Python literal")


def _preprocessing_overlay(value: Any, whole: str) -> dict[str, Any]:
    """timm's way to state how a model's images are prepared; nothing else of its pretrained configuration may be
    set.
    """
    if not isinstance(value, dict) or not set(value) <= _PREPROCESSING:
        raise ModelFileError(f"architecture {whole!r}: pretrained_cfg_overlay is a dict with keys of "
                             f"{', '.join(sorted(_PREPROCESSING))}")
    return value


def skeleton(architecture: Architecture) -> nn.Module | None:
    """The module without memory, on the meta device; None where it cannot be built so.

    Raises:
        InputError: it is too large for this machine.
    """
    try:
        with warnings.catch_warnings(), limits.rehearsal(str(architecture)):
            warnings.simplefilter("ignore")
            return _creator(architecture)(replace(architecture, pretrained=False))
    except InputError:
        raise
    except Exception:  # some modules need values; what else is wrong, building in earnest says
        return None


def _creator(architecture: Architecture) -> Callable[[Architecture], nn.Module]:
    return _create_timm if architecture.library == "timm" else _create_torchvision


def _create_timm(architecture: Architecture) -> nn.Module:
    import timm

    if not timm.is_model(architecture.name):
        _unknown_name(architecture, timm.list_models())
    model: nn.Module = timm.create_model(architecture.name, pretrained=architecture.pretrained, **architecture.options)
    return model


def _create_torchvision(architecture: Architecture) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if architecture.name not in known:
        _unknown_name(architecture, known)
    weights = "DEFAULT" if architecture.pretrained else None
    options = dict(architecture.options)
    takes = inspect.signature(models.get_model_builder(architecture.name)).parameters
    if options.get("weights") is not None or options.get("weights_backbone") is not None:
        raise ModelFileError(f"{architecture}: weights are downloaded; say 'pretrained' if that is meant")
    if not architecture.pretrained and "weights_backbone" in takes:  # its default is a download
        options["weights_backbone"] = None
    options["weights"] = weights
    model: nn.Module = models.get_model(architecture.name, **options)
    return model


def _unknown_name(architecture: Architecture, known: list[str]) -> None:
    close = difflib.get_close_matches(architecture.name, known, n=5, cutoff=0.5)
    hint = f"; close: {', '.join(close)}" if close else f"; {architecture.library} knows {len(known)} models"
    raise ModelFileError(f"{architecture.library} has no model {architecture.name!r}{hint}")


def _unknown_keyword(error: TypeError) -> str:
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"the model takes no option {match.group(1)!r}" if match else ""


def _image_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(getattr(module, "pretrained_cfg", None), dict):
        return _timm_shape(module)
    shape = config_image_shape(module)
    if shape is None:
        raise InputError(
            f"{type(module).__name__} does not say what input it takes; pass --input-shape without the batch "
            "dimension, such as 3 224 224"
        )
    return shape


def _timm_shape(module: nn.Module) -> tuple[int, int, int]:
    """(C, H, W): the size that the patch embedding was built for, which `img_size=` changes but timm's configuration
    keeps.
    """
    config: Any = module.pretrained_cfg
    channels, height, width = config["input_size"]
    embed = getattr(module, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = size
    first = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    reads_image = config.get("first_conv") != []  # so a model says whose convolutions all work on something made of it
    if first is not None and first.groups == 1 and reads_image:
        channels = first.in_channels
    return int(channels), int(height), int(width)


def config_image_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) that a transformers configuration or a torchvision module names; None where it names none."""
    config: Any = getattr(module, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    if size is None:
        size = getattr(module, "image_size", None)  # torchvision's ViT
        size = size if isinstance(size, int) else None
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        return None
    return int(getattr(config, "num_channels", 3)), int(size[0]), int(size[1])
