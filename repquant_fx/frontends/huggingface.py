"""transformers directories (`config.json`, weights, tokenizer, image processor) and `hf:PATH_OR_ID`.

Only classes of the installed transformers build the model: code that comes with a directory is refused, and a directory
never causes a network access. A hub id is downloaded first and is then a directory like any other.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError, RepQuantWarning, first_line, is_out_of_memory
from repquant_fx.frontends.directory import CONFIG, DESCRIPTIONS, WEIGHTS, ModelDirectory, find_files, listed, staged
from repquant_fx.frontends.directory_weights import open_weights
from repquant_fx.frontends.mapped import map_directory
from repquant_fx.frontends.offline import library, quiet_offline
from repquant_fx.frontends.screening import screen
from repquant_fx.frontends.signature import can_write
from repquant_fx.frontends.tables import check_tables
from repquant_fx.frontends.tasks import GENERAL, class_for, task_of
from repquant_fx.security.guard import guarded_unless
from repquant_fx.security.names import check_names

PREFIX = "hf:"
_MOST_BYTES = 16 << 20  # of a configuration; most of it are names of labels


def is_huggingface(source: str) -> bool:
    """Whether a source is `hf:...` or a directory with a `config.json`."""
    try:
        return source.startswith(PREFIX) or (Path(source) / "config.json").is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def find_directory(source: str) -> Path:
    """The directory of a source; a hub id (`hf:owner/name`, `hf:owner/name@revision`) is downloaded into the hub's
    cache.

    Raises:
        ModelFileError: it cannot be downloaded.
    """
    text = source.removeprefix(PREFIX)
    if text and (not source.startswith(PREFIX) or Path(text).is_dir()):
        return Path(text)
    name, _, revision = text.partition("@")
    library()
    import huggingface_hub

    try:
        for weights in WEIGHTS:  # pickled weights are fetched only where there are no others
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision or None, allow_patterns=[*DESCRIPTIONS, weights], ignore_patterns=["*/*"]
                )
            )
            if any(folder.glob(weights)):
                break
    except Exception as error:
        raise ModelFileError(
            f"{source} is neither a directory nor a model that can be downloaded: {first_line(error)}"
        ) from error
    return folder


def load_directory(
    folder: Path | ModelDirectory, task: str | None = None, offload_dir: str | Path | None = None
) -> tuple[nn.Module, str]:
    """(the model in float32 and eval mode, its task). Nothing is downloaded and no code of the directory runs.

    Args:
        folder: with `config.json` and weights, safetensors or `pytorch_model.bin`, whole or in shards with an index.
        task: one of `tasks.TASKS`; where None, the class that the configuration names is built.
        offload_dir: leave the weights in their files where they fit the model one to one; a folder for what must be
            converted.

    Raises:
        ModelFileError: no configuration, custom code, weights that are missing, damaged or do not fit.
        InputError: a task that there is not, or that the model cannot do; a model that this machine cannot hold.
    """
    files = find_files(folder)
    described = _description(files)
    weights = files.weights()
    with quiet_offline(), ExitStack() as stack:
        config = _configuration(described, files)
        cls = _class(config, task)
        check_tables(cls, described, f"{files.path / CONFIG}")
        skeleton = _skeleton(cls, config, files)
        if (
            offload_dir is not None
            and skeleton is not None
            and (mapped := _mapped(cls, config, files, weights, Path(offload_dir))) is not None
        ):
            return mapped, task or task_of(cls.__name__)
        try:
            tensors = open_weights(files, weights, stack)
        except InputError:
            raise
        except Exception as error:
            raise ModelFileError(
                f"the weights of {files.path} cannot be loaded into {cls.__name__}: {first_line(error)}"
            ) from error
        check_names(tensors, str(files.path))
        limits.check_amount(skeleton, tensors, f"{files.path / CONFIG} describes a {cls.__name__}")
        model, found = _read(cls, config, files.path, tensors)
        pooling = "add_pooling_layer"  # a headless model drawn from one with a head: its pooler is nobody's output
        if found["missing_keys"] and pooling in inspect.signature(cls.__init__).parameters:
            bare, without = _read(cls, config, files.path, tensors, **{pooling: False})
            model, found = (bare, without) if not without["missing_keys"] else (model, found)
    _check_fit(model, found, files.path, task)
    return model, task or task_of(cls.__name__)


def writes(source: str, task: str | None = None, allow_pickle: bool = False) -> bool:
    """Whether a source is a directory of an encoder-decoder that generates; its weights are not opened.

    Args:
        source, task: see `find_directory` and `load_directory`.
        allow_pickle: the user trusts the directory.

    Raises:
        ModelFileError, InputError: as `load_directory` does.
    """
    if not is_huggingface(source):
        return False
    files = find_files(find_directory(source))
    with guarded_unless(allow_pickle, f"reading {files.path / CONFIG}"), quiet_offline():
        config = _configuration(_description(files), files)
        return can_write(cls := _class(config, task), config, task or task_of(cls.__name__))


def _class(config: Any, task: str | None) -> Any:
    """The class that is built: for a task, or the one that the configuration names."""
    transformers = library()
    names = config.architectures if isinstance(config.architectures, list) else []
    named = next((name for name in map(str, names) if _is_model_class(getattr(transformers, name, None), config)), None)
    return getattr(transformers, named) if task is None and named else class_for(config, task or GENERAL)


def _description(files: ModelDirectory) -> dict[str, Any]:
    """The screened `config.json`. The other settings of the directory are screened, too: some are copied beside the
    exported model.
    """
    path = files.path / CONFIG
    adapter = (files.path / "adapter_config.json").is_file()
    if not files.has(CONFIG):
        hint = "; it holds an adapter, merge that into its base model first" if adapter else ""
        raise ModelFileError(f"not a transformers directory: {files.path} has no config.json{hint}")
    config = files.json(CONFIG, _MOST_BYTES)
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} does not hold an object")
    config = screen(config, str(path))
    if adapter:
        raise ModelFileError(f"{files.path} holds an adapter (adapter_config.json); merge it into the model first")
    for name in files.named("*config.json"):
        if name != CONFIG:
            screen(files.json(name, _MOST_BYTES), str(files.path / name))
    return config


def _configuration(described: dict[str, Any], files: ModelDirectory) -> Any:
    """What transformers makes of the screened description, of which alone it gets a copy."""
    transformers = library()
    try:
        with staged({CONFIG: json.dumps(described).encode()}) as private:
            config = transformers.AutoConfig.from_pretrained(private, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelFileError(
            f"{files.path / CONFIG} does not describe a model that transformers {transformers.__version__} knows: "
            f"{first_line(error)}"
        ) from error
    config.name_or_path = str(files.path)
    return config


def _skeleton(cls: Any, config: Any, files: ModelDirectory) -> nn.Module | None:
    """The model without memory; None where it cannot be built so."""
    try:
        with limits.rehearsal(f"the model that {files.path / CONFIG} describes"):
            model: nn.Module = cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
            return model
    except InputError:
        raise
    except Exception:  # some models need values; what else is wrong, building in earnest says
        return None


def _is_model_class(cls: Any, config: Any) -> bool:
    import transformers

    return (
        isinstance(cls, type)
        and issubclass(cls, transformers.PreTrainedModel)
        and getattr(cls, "config_class", None) is type(config)
    )


def _mapped(cls: Any, config: Any, files: ModelDirectory, weights: list[str], scratch: Path) -> nn.Module | None:
    if not all(name.endswith(".safetensors") for name in weights):
        return None
    try:
        return map_directory(cls, copy.deepcopy(config), [files.files[name] for name in weights], scratch)
    except InputError:
        raise
    except Exception:  # whatever it is, the ordinary way either knows how or says what is wrong
        return None


def _read(
    cls: Any, config: Any, folder: Path, tensors: Mapping[str, Any], **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what transformers reports of the names."""
    for attention in ("sdpa", "eager"):
        try:
            with limits.bounded_modules(f"the model that {folder}/config.json describes"):
                model, found = cls.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(tensors),
                    local_files_only=True,
                    weights_only=True,
                    dtype=torch.float32,
                    attn_implementation=attention,
                    output_loading_info=True,
                    **options,
                )
            model.config.name_or_path = str(folder)
            return model.eval(), found
        except InputError:
            raise
        except Exception as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue  # the architecture has none
            if is_out_of_memory(error):
                raise
            raise ModelFileError(
                f"the weights of {folder} cannot be loaded into {cls.__name__}: {first_line(error)}"
            ) from error
    raise AssertionError("unreachable")


def _check_fit(model: nn.Module, found: Mapping[str, Any], folder: Path, task: str | None) -> None:
    """Every weight of the model must come from the files; of theirs, whole heads may be left over."""
    cls = type(model).__name__
    missing = sorted(map(str, found["missing_keys"]))
    if missing:
        advice = (
            f"--task {task} needs weights that this model does not have; choose the task it was trained for"
            if task
            else "choose another --task, or complete the weights"
        )
        raise ModelFileError(f"{folder} lacks {len(missing)} weights of {cls}: {listed(missing)}; {advice}")
    for key, what in (("mismatched_keys", "of another shape"), ("error_msgs", "not readable")):
        if found.get(key):
            raise ModelFileError(
                f"{folder} has weights that are {what} in {cls}: {listed(sorted(map(str, found[key])))}"
            )
    constants = {name for name, _ in model.named_buffers()}
    extra = sorted(name for name in map(str, found["unexpected_keys"]) if name not in constants)
    inside = [name for name in extra if _is_inside(model, name)]
    if inside:
        raise ModelFileError(
            f"{folder} has {len(inside)} weights that {cls} has no place for: {listed(inside)}; its config.json "
            "describes "
            "another model"
        )
    if extra:
        warnings.warn(
            f"{cls} leaves out {len(extra)} weights of {folder}: {listed(extra)}", RepQuantWarning, stacklevel=4
        )


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
