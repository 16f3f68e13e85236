"""Sources of models: `timm:NAME`, a transformers directory or `hf:`, a `.pt2`, a pickled module, or weights for an
architecture.

The content of a file decides what it is, not its suffix. A file's bytes are read once, and what was screened is what is
loaded. Long because each kind of source has its function and they share the checks.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repquant_fx import limits
from repquant_fx.errors import InputError, ModelFileError, first_line
from repquant_fx.files import irregular
from repquant_fx.frontends import architectures, huggingface, signature
from repquant_fx.frontends.capture import Captured
from repquant_fx.frontends.directory import ModelDirectory, find_files
from repquant_fx.frontends.encoder_decoder import Writer, writer_of
from repquant_fx.frontends.exported import load_exported
from repquant_fx.frontends.part import Part
from repquant_fx.frontends.past import Past
from repquant_fx.frontends.pickled import load_pickled, refuse_bomb
from repquant_fx.frontends.processor import features_shape, load_preprocessing
from repquant_fx.frontends.tasks import check_task
from repquant_fx.frontends.tokenizer import has_tokenizer, load_tokenizer
from repquant_fx.options import Source
from repquant_fx.security.guard import guarded_unless
from repquant_fx.security.names import check_module_names, check_names

# the pickled magic number that opens a file of torch before 1.6
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_CONTAINERS = ("state_dict", "model", "module", "model_state_dict", "model_ema", "state_dict_ema")
_SHOWN = 8


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for capture. Exactly one of `module` and `exported` is set.

    Attributes:
        module: in eval mode, on the CPU, half precision raised to float32; transformers' `use_cache` is switched off.
        exported: a program as saved; where its batch dimension is static, it stays so.
        example_inputs: one tensor per input; batch 2 at least, unless a program with a static batch says otherwise.
        inputs_are_data: the inputs were stored in the `.pt2` by the user, so they can serve for calibration.
        preprocessing: of images; see `architectures.preprocessing`. None where nothing is known.
        source: what was loaded, in words.
        input_names: the keywords under which `forward` takes `example_inputs`; None where they are positional.
        dynamic_axes: the free axes of each input and their names, such as {0: "batch", 1: "sequence"}; None for the
            batch only.
        outputs: names of the outputs to keep; None for all.
        tokenizer: the transformers tokenizer that lies beside the model, if one does.
        task: one of `tasks.TASKS`; None where it is not known.
        float_modules: globs of module paths that stay float unless a recipe says otherwise.
        directory: the files of the transformers directory that it was read from, if any.
        trusted: the user vouches for its code: it was in memory, is built by a library from a name, or came with
            `allow_pickle`. Any other model runs under `security.guard`.
        part: where it comes from, if it is a part of another model.
        past: what it takes of earlier tokens, where it decodes with a key/value cache (see `past.as_decoder`).
        captured: its graph, where that was taken before; whoever rewrites it takes a copy.
        writer: how it writes its `decoder_input_ids`, where it is an encoder-decoder (see `encoder_decoder`).
        ends: of a decoder alone: tokens of `input_ids` after which, and at which, nothing counts.
        other_layers: of a half alone: paths of modules, those of the other half among them; a rule of the recipe that
            fits one of them is no mistake.
    """

    module: nn.Module | None
    exported: torch.export.ExportedProgram | None
    example_inputs: tuple[Tensor, ...]
    inputs_are_data: bool
    preprocessing: dict[str, Any] | None
    source: str
    input_names: tuple[str, ...] | None = None
    dynamic_axes: tuple[dict[int, str], ...] | None = None
    outputs: tuple[str, ...] | None = None
    tokenizer: Any | None = None
    task: str | None = None
    float_modules: tuple[str, ...] = ()
    directory: ModelDirectory | None = None
    trusted: bool = True
    part: Part | None = None
    past: Past | None = None
    captured: Captured | None = None
    writer: Writer | None = None
    ends: tuple[int, ...] = ()
    other_layers: tuple[str, ...] = ()

    @property
    def guard(self) -> AbstractContextManager[None]:
        """What to run the model in."""
        return guarded_unless(self.trusted, f"running {self.source}")


def load_model(
    source: str | Path,
    *,
    arch: str | None = None,
    allow_pickle: bool = False,
    input_shape: Sequence[int] | None = None,
    task: str | None = None,
    offload_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a model without executing what its file says, unless `allow_pickle`.

    Args:
        source: `timm:NAME,key=value,...[,pretrained]`, `torchvision:NAME,...`; a transformers directory, or `hf:` with
            a directory or a hub id (which is downloaded); or a file: `.pt2` of torch.export.save, a module or state
            dict of torch.save, or safetensors.
        arch: the architecture of a state dict, `timm:NAME,...`. Safetensors may carry it in their metadata under
            `arch`.
        allow_pickle: the user trusts the file; it may execute code.
        input_shape: of one example, ALWAYS without the batch dimension: (C, H, W) or (length,). Needed where the model
            does not tell; otherwise overrides it.
        task: of a transformers model, one of `tasks.TASKS`. A directory is built for it; of any other model it chooses
            the outputs and how text is read. Deduced where None.
        offload_dir: leave the weights of a transformers directory in their files (see `frontends.mapped`).

    Raises:
        ModelFileError: not a model, damaged, unsafe, or at odds with the architecture.
        InputError: `arch` with a source that is a whole model; an unknown or malformed input shape; an unknown task.
    """
    return load_source(Source(source, arch, input_shape, allow_pickle, task, offload_dir=offload_dir))


def load_source(source: Source) -> LoadedModel:
    """`load_model`, of what it was given as one object.

    Raises:
        ModelFileError, InputError: as `load_model` does.
    """
    text = str(source.model)
    check_task(source.task)
    if architectures.is_architecture(text):
        _no_architecture_wanted(source)
        named = architectures.parse_architecture(text)
        return _loaded(architectures.build(named), str(named), source)
    folder = None
    if huggingface.is_huggingface(text):
        _no_architecture_wanted(source)
        folder = huggingface.find_directory(text)  # `hf:` may download, so it is outside the guard
    writable = [Path(source.offload_dir)] if source.offload_dir is not None else []
    with guarded_unless(source.allow_pickle, f"loading {text}", writable):
        loaded = _from_directory(folder, source) if folder is not None else _from_file(source)
    return replace(loaded, trusted=source.allow_pickle)


def _from_file(source: Source) -> LoadedModel:
    text = str(source.model)
    data = _read(Path(text))
    kind = _kind(data, text)
    if kind == "safetensors":
        weights, stored = _safetensors(data, text)
        return _from_weights(weights, source.arch or stored, source)
    if kind == "pt2":
        _no_architecture_wanted(source)
        return _from_program(data, source)
    found = load_pickled(data, text, allow_pickle=source.allow_pickle)
    module = _module_in(found)
    if module is not None:
        _no_architecture_wanted(source)
        return _loaded(module, f"{type(module).__name__} pickled in {text}", source)
    return _from_weights(_weights_in(found, text), source.arch, source)


def _no_architecture_wanted(source: Source) -> None:
    if source.arch is not None:
        raise InputError(f"--arch {source.arch} was given, but {source.model} is a whole model; --arch is for state "
                         "dicts and safetensors")


def _read(path: Path) -> bytes:
    if kind := irregular(path):
        raise ModelFileError(f"not a model file: {path} is {kind}")
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise ModelFileError(
            f"not a model file: {path} is a directory without config.json; give a transformers directory or the file "
            "in it"
        ) from error
    except FileNotFoundError as error:
        raise ModelFileError(
            f"not a model file: {path} does not exist (architectures are written timm:NAME)"
        ) from error
    except OSError as error:
        raise ModelFileError(
            f"not a model file: {str(path)[:200]} cannot be read: {error.strerror or error}"
        ) from error
    except ValueError as error:  # a path with a null byte
        raise ModelFileError(f"not a model file: {str(path)!r} cannot be read: {error}") from error
    if not data:
        raise ModelFileError(f"not a model file: {path} is empty")
    return data


def _kind(data: bytes, where: str) -> str:
    """`pt2`, `torch` or `safetensors`, from the content.

    Raises:
        ModelFileError: anything else, saying what it looks like.
    """
    if data[:2] == b"PK":
        return _zip_kind(data, where)
    if data.startswith(_TORCH_LEGACY):
        return "torch"
    if len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 100_000_000:
        return "safetensors"
    raise ModelFileError(
        f"not a model file: {where} {_looks_like(data, where)}. Expected a .pt2 of torch.export.save, a file of "
        "torch.save, or safetensors"
    )


def _looks_like(data: bytes, where: str) -> str:
    if where.endswith(".onnx") or (data[:1] == b"\x08" and re.search(b"onnx|pytorch", data[:200])):
        return "is an ONNX model, which is what repquant-fx writes; give the PyTorch model it came from"
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        return "is a plain Python pickle, which is never loaded; write it with torch.save"
    if data[:2] == b"\x1f\x8b":
        return "is compressed with gzip; unpack it first"
    try:
        head = data[:512].decode("utf-8", "strict" if len(data) <= 512 else "ignore")
        if head.isprintable() or not any(ord(c) < 32 and c not in "\t\n\r\f" for c in head):
            return f"is a text file that begins {head.splitlines()[0][:40]!r}"
    except (UnicodeDecodeError, IndexError):
        pass
    return f"begins with the bytes {data[:8].hex(' ')} and has {len(data)} bytes"


def _zip_kind(data: bytes, where: str) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise ModelFileError(f"not a model file: {where} begins like a zip archive but is truncated or damaged "
                             f"({first_line(error)}); copy or download it again") from error
    # the directory found is that of an archive inside this one
    if entries and all(entry.header_offset > 0 for entry in entries):
        raise ModelFileError(f"not a model file: {where} begins like a zip archive but is truncated or damaged "
                             "(its directory is missing); copy or download it again")
    refuse_bomb(data, where)
    inner = {entry.filename.partition("/")[2] for entry in entries}
    if any(name == "archive_format" or name.startswith("models/") for name in inner):
        return "pt2"
    if any(entry.filename == "serialized_exported_program.json" for entry in entries):
        raise ModelFileError(
            f"{where} was written by torch.export.save before torch 2.8; load it there and save it again"
        )
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ModelFileError(
            f"{where} is a TorchScript archive; TorchScript is not read. Export the original module with "
            "torch.export.export and torch.export.save"
        )
    if "data.pkl" in inner:
        return "torch"
    shown = ", ".join(sorted(entry.filename for entry in entries)[:4]) or "nothing"
    raise ModelFileError(f"not a model file: {where} is a zip archive without a model; it holds {shown}")


def ready(module: nn.Module, source: str, input_shape: Sequence[int] | None = None, task: str | None = None,
          preprocessing: dict[str, Any] | None = None, tokenizer: Any | None = None,
          features: Sequence[int] | None = None) -> LoadedModel:
    """A module with the inputs that it implies.

    Raises:
        InputError: it does not tell what it takes.
    """
    if not signature.is_transformers(module):
        return LoadedModel(
            module,
            None,
            architectures.example_inputs(module, input_shape),
            False,
            architectures.preprocessing(module),
            source,
            task=task,
        )
    module = signature.stateless(module)
    found = signature.read_signature(module, input_shape=input_shape, task=task,
                                     image_size=preprocessing["input_size"] if preprocessing else None,
                                     features=features)
    return LoadedModel(
        module,
        None,
        found.example_inputs,
        False,
        preprocessing or architectures.preprocessing(module),
        source,
        input_names=found.input_names,
        dynamic_axes=found.dynamic_axes,
        outputs=found.outputs,
        tokenizer=tokenizer,
        task=found.task,
        float_modules=found.float_modules,
        writer=writer_of(module, found.input_names),
    )


def _loaded(module: nn.Module, name: str, source: Source, **about: Any) -> LoadedModel:
    """A module that was built or read; `name` is for messages, `about` goes to `ready`."""
    if isinstance(module, nn.DataParallel):
        module = module.module
    try:
        check_module_names(module, name)
        module = module.to("cpu").eval()
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
            module = module.float()
        check_finite(module.named_parameters(), module.named_buffers(), name)
        return ready(module, name, source.input_shape, **{"task": source.task, **about})
    except InputError:
        raise
    except Exception as error:  # a file may hold any state
        raise ModelFileError(f"{name} holds a module that is not whole: {first_line(error)}") from error


def _from_directory(folder: Path, source: Source) -> LoadedModel:
    files = find_files(folder)
    module, task = huggingface.load_directory(files, source.task, source.offload_dir)
    preprocessing = load_preprocessing(files, architectures.config_image_shape(module))
    tokenizer = load_tokenizer(files) if has_tokenizer(files) else None
    loaded = _loaded(module, f"{type(module).__name__} of {source.model}", source, task=task,
                     preprocessing=preprocessing, tokenizer=tokenizer, features=features_shape(files))
    return replace(loaded, directory=files)


def _from_program(data: bytes, source: Source) -> LoadedModel:
    where = str(source.model)
    if source.input_shape is not None:
        raise InputError(
            f"--input-shape was given, but {where} is an exported program, which fixes the shapes of its inputs"
        )
    program, inputs, stored = load_exported(data, where, allow_pickle=source.allow_pickle)
    parameters = [(name, tensor) for name, tensor in program.state_dict.items() if isinstance(tensor, nn.Parameter)]
    buffers = [(name, tensor) for name, tensor in program.state_dict.items() if not isinstance(tensor, nn.Parameter)]
    check_finite(parameters, buffers, where)
    return LoadedModel(None, program, inputs, stored, None, f"program exported in {where}", task=source.task)


def check_finite(parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Parameters must be finite. Buffers must not be NaN; an infinity there can be an attention mask."""
    parameters, buffers = list(parameters), list(buffers)
    try:
        for name, tensor in (*parameters, *buffers):  # one element, expanded, can claim any size
            limits.check_size(tensor.shape, f"{where}: {name}", tensor.element_size())
        broken = [
            name for name, tensor in parameters if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        broken += [name for name, tensor in buffers if tensor.is_floating_point() and bool(torch.isnan(tensor).any())]
    except (RuntimeError, TypeError) as error:  # sparse, quantized, without data
        raise ModelFileError(f"{where} holds a tensor that is not plain: {first_line(error)}") from error
    if broken:
        raise ModelFileError(f"{where} holds NaN or infinite weights in {_listed(broken)}; "
                             "training diverged or the file is damaged")


def _module_in(found: Any) -> nn.Module | None:
    """The module that was saved, by itself or under a customary key of a checkpoint."""
    if isinstance(found, nn.Module):
        return found
    if isinstance(found, Mapping):
        return next((found[key] for key in _CONTAINERS if isinstance(found.get(key), nn.Module)), None)
    return None


def _weights_in(found: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what a file held, by itself or nested one level."""
    candidates = [found] + ([found[key] for key in _CONTAINERS if key in found] if isinstance(found, Mapping) else [])
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(
                isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items()):
            return dict(candidate)
    if isinstance(found, Mapping):
        raise ModelFileError(
            f"{where} holds a dict without a state dict; its keys are {_listed([str(key) for key in found])}; "
            f"weights are looked for under {', '.join(_CONTAINERS)}"
        )
    raise ModelFileError(f"{where} holds a {type(found).__name__}, not a module or a state dict")


def _safetensors(data: bytes, where: str) -> tuple[dict[str, Tensor], str | None]:
    """(the tensors, the architecture named in the metadata or None)."""
    import safetensors.torch

    try:
        weights = dict(sorted(safetensors.torch.load(data).items()))  # its order is random
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = (header.get("__metadata__") or {}).get("arch")
    except Exception as error:
        raise ModelFileError(f"not a model file: {where} begins like safetensors but is truncated or damaged "
                             f"({first_line(error)})") from error
    return weights, stored


def _from_weights(weights: dict[str, Tensor], arch: str | None, source: Source) -> LoadedModel:
    where = str(source.model)
    if not arch:
        raise ModelFileError(f"{where} holds a state dict with {len(weights)} tensors ({_listed(list(weights))}) "
                             "but no architecture; pass --arch timm:NAME")
    check_names(weights, where)
    named = architectures.parse_architecture(arch)
    if named.pretrained:
        raise InputError(f"--arch {arch}: 'pretrained' makes no sense with the weights of {where}; leave it out")
    if weights and all(name.startswith("module.") for name in weights):  # saved from DataParallel
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    check_finite(weights.items(), (), where)
    # a misfit is known before memory is taken
    if (skeleton := architectures.skeleton(named)) is not None:
        _check_fit(skeleton.state_dict(), weights, f"the weights of {where} do not fit {named}")
    module = architectures.build(named)
    _check_fit(module.state_dict(), weights, f"the weights of {where} do not fit {named}")
    try:
        module.load_state_dict(weights)
    except Exception as error:
        raise ModelFileError(f"the weights of {where} do not fit {named}: {first_line(error)}") from error
    return _loaded(module, f"{named} with the weights of {where}", source)


def _check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], complaint: str) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shapes = [f"{name} is {list(given[name].shape)} instead of {list(wanted[name].shape)}"
              for name in wanted if name in given and given[name].shape != wanted[name].shape]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {what}: {_listed(names)}" for what, names in groups if names]
    if problems:
        raise ModelFileError(f"{complaint}; {'; '.join(problems)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
