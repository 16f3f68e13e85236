"""transformers directories (`config.json`, weights, tokenizer, image processor) and `hf:PATH_OR_ID`.

Only classes of the installed transformers build the model: code that comes with a directory is refused, and a directory never
causes a network access. A hub id is downloaded first and is then a directory like any other.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError, RepQuantWarning, is_failure
from repquant_fx.files import irregular
from repquant_fx.frontends.mapped import map_directory
from repquant_fx.frontends.pickled import check_pickle, first_line
from repquant_fx.frontends.tasks import GENERAL, class_for, task_of

PREFIX = "hf:"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.jinja"]  # of the model, its tokenizer and its image processor
_ELSEWHERE = ("modules.json", "data_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SHOWN = 8
_MOST_COUNTED = 1_000_000


def is_huggingface(source: str) -> bool:
    """Whether a source is `hf:...` or a directory with a `config.json`."""
    try:
        return source.startswith(PREFIX) or (Path(source) / "config.json").is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def find_directory(source: str) -> Path:
    """The directory of a source; a hub id (`hf:owner/name`, `hf:owner/name@revision`) is downloaded into the hub's cache.

    Raises:
        ModelFileError: it cannot be downloaded.
    """
    text = source.removeprefix(PREFIX)
    if text and (not source.startswith(PREFIX) or Path(text).is_dir()):
        return Path(text)
    name, _, revision = text.partition("@")
    _library()
    import huggingface_hub

    try:
        for weights in _WEIGHTS:  # pickled weights are fetched only where there are no others
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=[*_DESCRIPTIONS, weights],
                                                            ignore_patterns=["*/*"]))
            if any(folder.glob(weights)):
                break
    except Exception as error:
        raise ModelFileError(f"{source} is neither a directory nor a model that can be downloaded: {first_line(error)}") from error
    return folder


def load_directory(folder: Path, task: str | None = None, offload_dir: str | Path | None = None) -> tuple[nn.Module, str]:
    """(the model in float32 and eval mode, its task). Nothing is downloaded and no code of the directory runs.

    Args:
        folder: with `config.json` and weights, safetensors or `pytorch_model.bin`, whole or in shards with an index.
        task: one of `tasks.TASKS`; where None, the class that the configuration names is built.
        offload_dir: leave the weights in their files where they fit the model one to one; a folder for what must be converted.

    Raises:
        ModelFileError: no configuration, custom code, weights that are missing, damaged or do not fit.
        InputError: a task that there is not, or that the model cannot do.
    """
    _check_description(folder)
    transformers = _library()
    with quiet_offline():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ModelFileError(f"{folder}/config.json does not describe a model that transformers {transformers.__version__} knows: "
                                 f"{first_line(error)}") from error
        listed = config.architectures if isinstance(config.architectures, list) else []
        named = next((name for name in map(str, listed) if _is_model_class(getattr(transformers, name, None), config)), None)
        cls = getattr(transformers, named) if task is None and named else class_for(config, task or GENERAL)
        if offload_dir is not None and (mapped := _mapped(cls, config, folder, Path(offload_dir))) is not None:
            return mapped, task or task_of(cls.__name__)
        model, found = _read(cls, config, folder)
        pooling = "add_pooling_layer"  # a headless model drawn from one with a head: its pooler is nobody's output
        if found["missing_keys"] and pooling in inspect.signature(cls.__init__).parameters:
            bare, without = _read(cls, config, folder, **{pooling: False})
            model, found = (bare, without) if not without["missing_keys"] else (model, found)
    _check_fit(model, found, folder, task)
    return model, task or task_of(cls.__name__)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    transformers = _library()
    if not has_tokenizer(folder):
        raise InputError(f"there is no tokenizer in {folder}: looked for {', '.join(_TOKENIZERS)}")
    try:
        with quiet_offline():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"the tokenizer of {folder} cannot be read: {first_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def descriptions(folder: Path) -> list[Path]:
    """The files of a directory that describe the model, its tokenizer and its processor.

    No weights, no index of weights, and no `modules.json` of a sentence encoder, which names further folders of weights.
    """
    return sorted({path for pattern in _DESCRIPTIONS for path in folder.glob(pattern)
                   if path.is_file() and not path.match("*.index.json") and path.name not in _ELSEWHERE})


def load_preprocessing(folder: Path, expected: Sequence[int] | None) -> dict[str, Any] | None:
    """The image processor of a directory as a timm data config (see `architectures.preprocessing`); None where there is none.

    Args:
        expected: (C, H, W) that the model was built for, used where the processor does not lead to one size.

    Warns:
        RepQuantWarning: its resizing has no counterpart; the images are resized to the model's size instead.
    """
    if not any((folder / name).is_file() for name in _PROCESSORS):
        return None
    try:
        with quiet_offline():
            processor = _library().AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return preprocessing_of(processor, expected)
    except Exception as error:
        warnings.warn(f"the image processor of {folder} cannot be read ({first_line(error)}); images will get the default preprocessing",
                      RepQuantWarning, stacklevel=3)
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
        size, mode, share = (cropped["height"], cropped["width"]), "squash" if height else "center", cropped["height"] / edge
    elif height and width:
        size, mode, share = (height, width), "squash", 1.0
    else:
        if expected is None:
            return None
        warnings.warn(f"the model's image processor resizes to {dict(get('size', {}))}, which does not lead to one size; images are "
                      f"resized to {expected[1]}x{expected[2]} as a whole", RepQuantWarning, stacklevel=3)
        size, mode, share = (expected[1], expected[2]), "squash", 1.0
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"its size is {size}")
    channels = expected[0] if expected is not None else 3
    # the processor computes (pixel * factor - mean) / std of 0..255, timm the same of 0..1
    factor = 255 * float(get("rescale_factor", 1 / 255)) if get("do_rescale", True) else 255.0
    mean, std = (get("image_mean", [0.0]), get("image_std", [1.0])) if get("do_normalize", True) else ([0.0], [1.0])
    return {"input_size": [channels, *size], "interpolation": _interpolation(get("resample")), "crop_pct": share, "crop_mode": mode,
            "mean": [float(m) / factor for m in _listed(mean, channels)], "std": [float(s) / factor for s in _listed(std, channels)]}


@contextmanager
def quiet_offline() -> Iterator[None]:
    """No network, no progress bars and no log of transformers while a directory is read."""
    import huggingface_hub.constants as constants
    from transformers.utils import logging as library_log

    was_offline, level, bars = constants.HF_HUB_OFFLINE, library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    library_log.set_verbosity(logging.CRITICAL)
    library_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        library_log.set_verbosity(level)
        if bars:
            library_log.enable_progress_bar()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelFileError("transformers models need transformers: pip install 'repquant-fx[language]'") from error
    return transformers


def _check_description(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        adapter = "; it holds an adapter, merge that into its base model first" if (folder / "adapter_config.json").is_file() else ""
        raise ModelFileError(f"not a transformers directory: {folder} has no config.json{adapter}")
    for file in folder.iterdir():
        if kind := irregular(file):
            raise ModelFileError(f"not a transformers directory: {file} is {kind}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} does not hold an object")
    if (count := _absurd_count(config)) is not None:
        raise ModelFileError(f"{path} asks for {count}")
    if "auto_map" in config:
        raise ModelFileError(f"{path} asks for code of its own (auto_map: {config['auto_map']}), which is never run. If a class of "
                             "transformers itself is meant, remove auto_map; else save the model with torch.export.save")
    if config.get("quantization_config"):
        raise ModelFileError(f"{path} has a quantization_config: the weights are already quantized; give the full-precision model")
    if (folder / "adapter_config.json").is_file():
        raise ModelFileError(f"{folder} holds an adapter (adapter_config.json); merge it into the model first")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise ModelFileError(f"{folder} has no weights: expected model.safetensors, its shards with an index, or pytorch_model.bin")
    if not any(folder.glob(_WEIGHTS[0])):
        for file in folder.glob(_WEIGHTS[1]):
            check_pickle(file.read_bytes(), str(file))
    for file in folder.glob("*.index.json"):
        _check_index(file)


def _absurd_count(value: Any, key: str = "") -> str | None:
    """A number of layers or labels that no model has: a configuration makes a list of that length before there is a model to measure."""
    if isinstance(value, dict):
        return next((found for inner, item in value.items() if (found := _absurd_count(item, inner))), None)
    wrong = isinstance(value, int) and value > _MOST_COUNTED and re.fullmatch(r"num_labels|\w*layers?|depths?", key)
    return f"{key} = {str(value)[:40]}" if wrong else None


def _check_index(path: Path) -> None:
    """Shards lie beside their index."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = [shard for shard in shards if Path(shard).name != shard]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{path} is not an index of shards: {first_line(error)}") from error
    if wrong:
        raise ModelFileError(f"{path} names files outside of its directory: {_named(sorted(wrong))}")


def _is_model_class(cls: Any, config: Any) -> bool:
    import transformers

    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and getattr(cls, "config_class", None) is type(config)


def _mapped(cls: Any, config: Any, folder: Path, scratch: Path) -> nn.Module | None:
    try:
        return map_directory(cls, copy.deepcopy(config), folder, scratch)
    except InputError:
        raise
    except Exception:  # whatever it is, the ordinary way either knows how or says what is wrong
        return None


def _read(cls: Any, config: Any, folder: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what transformers reports of the names."""
    for attention in ("sdpa", "eager"):
        try:
            with limits.bounded_modules(f"the model that {folder}/config.json describes"):
                model, found = cls.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False, weights_only=True,
                                                   dtype=torch.float32, attn_implementation=attention, output_loading_info=True, **options)
            return model.eval(), found
        except InputError:
            raise
        except Exception as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue  # the architecture has none
            raise ModelFileError(f"the weights of {folder} cannot be loaded into {cls.__name__}: {first_line(error)}") from error
    raise AssertionError("unreachable")


def _check_fit(model: nn.Module, found: Mapping[str, Any], folder: Path, task: str | None) -> None:
    """Every weight of the model must come from the files; of theirs, whole heads may be left over."""
    cls = type(model).__name__
    missing = sorted(map(str, found["missing_keys"]))
    if missing:
        advice = f"--task {task} needs weights that this model does not have; choose the task it was trained for" if task else \
            "choose another --task, or complete the weights"
        raise ModelFileError(f"{folder} lacks {len(missing)} weights of {cls}: {_named(missing)}; {advice}")
    for key, what in (("mismatched_keys", "of another shape"), ("error_msgs", "not readable")):
        if found.get(key):
            raise ModelFileError(f"{folder} has weights that are {what} in {cls}: {_named(sorted(map(str, found[key])))}")
    constants = {name for name, _ in model.named_buffers()}
    extra = sorted(name for name in map(str, found["unexpected_keys"]) if name not in constants)
    inside = [name for name in extra if _is_inside(model, name)]
    if inside:
        raise ModelFileError(f"{folder} has {len(inside)} weights that {cls} has no place for: {_named(inside)}; its config.json describes "
                             "another model")
    if extra:
        warnings.warn(f"{cls} leaves out {len(extra)} weights of {folder}: {_named(extra)}", RepQuantWarning, stacklevel=4)


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether a weight without a place belongs to the trunk, and not to a head beside it or on top of it."""
    trunk: nn.Module = getattr(model, "base_model", model)
    tops = {id(model), id(trunk)}
    inside = {id(module) for module in trunk.modules()} - tops
    for start in (model, trunk):
        module = start
        for part in name.split(".")[:-1]:
            child = dict(module.named_children()).get(part)
            if child is None:
                break
            module = child
        if id(module) in inside:
            return True
    return False


def _interpolation(resample: Any) -> str:
    """timm's word for PIL's filter number."""
    return {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}.get(
        int(resample) if isinstance(resample, int) else -1, "bicubic")


def _listed(value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
