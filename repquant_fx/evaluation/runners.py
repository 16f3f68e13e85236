"""A model as a function of named tensors: torch and ONNX Runtime behind one interface, so that one measurement serves
both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import torch
from torch import Tensor

from repquant_fx.calibration.images import shape_text
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.compiled_module import run_from_file
from repquant_fx.errors import InputError, RepQuantError, first_line
from repquant_fx.evaluation.labels import labels_beside, read_labels
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.reading import read_onnx
from repquant_fx.frontends.huggingface import is_huggingface
from repquant_fx.frontends.loading import LoadedModel, load_source
from repquant_fx.options import Source
from repquant_fx.security.guard import guarded
from repquant_fx.torch_private import pytree

Call: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_ONNX_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
               "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
               "tensor(uint8)": torch.uint8}


@dataclass(frozen=True)
class Runner:
    """A model that can be run.

    Attributes:
        call: named inputs of the exact dtypes and shapes to named outputs.
        inputs: shape (None where free) and dtype of each.
        batches: the symbol or the size of dimension 0 of each input; inputs with equal ones must agree in it.
        source: for messages.
        preprocessing: of images, a timm data config; None where nothing is known.
        tokenizer: of transformers, if one lies beside the model.
        task: one of `frontends.tasks.TASKS`; None where it is not known.
        labels: names of its classes by number, where its configuration has them.
    """

    call: Call
    inputs: tuple[InputSpec, ...]
    batches: tuple[str | int | None, ...]
    source: str
    preprocessing: Mapping[str, Any] | None = None
    tokenizer: Any | None = None
    task: str | None = None
    labels: Mapping[int, str] | None = None

    def input(self, name: str) -> InputSpec | None:
        """The input of this name."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def limit(self, name: str, wanted: int) -> int:
        """How many rows of an input to give at a time: its fixed batch, or as many as wanted."""
        spec = self.input(name)
        return (spec.shape[0] if spec is not None and spec.shape else None) or wanted

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model.

        Where the batch is fixed, or two inputs share it, shorter inputs are filled up with copies of their last row;
        the caller cuts the rows that this adds to the outputs (`first_rows`).

        Args:
            tensors: one per input; converted to its dtype.

        Raises:
            InputError: inputs are missing or unknown, a shape does not fit, or the model fails on them.
        """
        missing = [spec.name for spec in self.inputs if spec.name not in tensors]
        extra = [name for name in tensors if self.input(name) is None]
        if missing or extra:
            raise InputError(f"{self.source} takes {', '.join(spec.name for spec in self.inputs)}; "
                             + "; ".join(f"evaluate {what}: {', '.join(names)}" for what, names in
                                         (("cannot make up", missing), ("has more than it takes", extra)) if names))
        rows: dict[str | int | None, int] = {}
        for spec, batch in zip(self.inputs, self.batches):
            rows[batch] = batch if isinstance(batch, int) else max(rows.get(batch, 0), len(tensors[spec.name]))
        feed = {
            spec.name: _fitted(tensors[spec.name], rows[batch], spec, self.source)
            for spec, batch in zip(self.inputs, self.batches)
        }
        try:
            return self.call(feed)
        except RepQuantError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feed.items())
            words = (str(error).splitlines() or [""])[0]
            raise InputError(f"{self.source} does not run on {shapes}: {type(error).__name__}: {words}") from error


def first_rows(outputs: Tensor, count: int) -> Tensor:
    """The first `count` rows, without what a fixed batch was filled up with."""
    return outputs[:count] if outputs.ndim and len(outputs) > count else outputs


def open_runner(source: Source, threads: int | None = None, modules: Mapping[str, str] | None = None) -> Runner:
    """A model ready to run: an `.onnx` in ONNX Runtime, anything else that `load_model` takes in torch.

    Args:
        source: its task is that a transformers directory is built for; of others the model decides.
        threads: of ONNX Runtime; None leaves the choice to it. For torch see `torch_threads`.
        modules: files that run in place of modules of a torch model, by their paths.

    Raises:
        InputError: the model or a file cannot be loaded.
    """
    if Path(source.model).suffix.lower() == ".onnx":
        if modules:
            raise InputError(f"--module {next(iter(modules))}: {source.model} is a file in which modules are no parts "
                             "any more; give the torch model")
        return _onnx_runner(str(source.model), threads)
    return runner_of(load_torch(source, threads, modules), str(source.model))


def preprocessing_from_onnx(path: str | Path) -> dict[str, Any] | None:
    """The timm data config stored in an ONNX file's metadata, or None.

    Raises:
        ModelFileError: the file is missing or refused (see `exporters.reading`), or what is stored is no preprocessing.
    """
    return read_onnx(path).metadata.preprocessing()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch with this many threads, for a while."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fitted(tensor: Tensor, rows: int, spec: InputSpec, source: str) -> Tensor:
    """The tensor in the input's dtype with so many rows, checked against its fixed dimensions."""
    if len(tensor) < rows:
        tensor = torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
    if tensor.ndim != len(spec.shape) or any(want not in (None, have) for want, have in zip(spec.shape, tensor.shape)):
        raise InputError(
            f"{source} takes {spec.name} of shape {shape_text(spec.shape)}, fixed in the file; the data gives "
            f"{shape_text(tensor.shape)}"
        )
    return tensor.to(spec.dtype).contiguous()


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _onnx_runner(path: str, threads: int | None) -> Runner:
    from repquant_fx.runtime import session

    file = read_onnx(path)
    preprocessing = file.metadata.preprocessing()
    with guarded(f"reading {path}"):
        found = session(file, threads=threads)
    return replace(_session_runner(found, path), preprocessing=preprocessing, tokenizer=_tokenizer_beside(Path(path)),
                   labels=labels_beside(Path(path)))


def proto_runner(model: onnx.ModelProto | OnnxModel, source: str, threads: int | None = None) -> Runner:
    """A model in memory under ONNX Runtime; `source` is for messages."""
    from repquant_fx.runtime import session

    return _session_runner(session(model, threads=threads), source)


def _session_runner(found: Any, path: str) -> Runner:
    from repquant_fx.runtime import run

    unknown = [f"{i.name} {i.type}" for i in found.get_inputs() if i.type not in _ONNX_TYPES]
    if unknown:
        raise InputError(f"evaluate cannot feed inputs of {path}: {', '.join(unknown)}")
    names = [output.name for output in found.get_outputs()]
    specs, batches = [], []
    for entry in found.get_inputs():
        shape = tuple(size if isinstance(size, int) and size > 0 else None for size in entry.shape)
        below = _vocabulary(found.get_outputs()) if entry.name == "input_ids" else None
        specs.append(InputSpec(entry.name, shape, _ONNX_TYPES[entry.type], below))
        batches.append(entry.shape[0] if entry.shape else None)

    def call(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            with guarded(f"running {path}"):
                return dict(zip(names, run(found, feed)))
        except Exception as error:
            raise InputError(f"{path} fails under ONNX Runtime: {first_line(error)}") from error

    return Runner(call, tuple(specs), tuple(batches), path)


def _vocabulary(outputs: Sequence[Any]) -> int | None:
    """The last dimension of the logits of a language model."""
    shapes = [output.shape for output in outputs if output.name == "logits" and len(output.shape) == 3]
    return shapes[0][-1] if shapes and isinstance(shapes[0][-1], int) else None


def _tokenizer_beside(path: Path) -> Any | None:
    from repquant_fx.frontends.tokenizer import has_tokenizer, load_tokenizer

    return load_tokenizer(path.parent) if has_tokenizer(path.parent) else None


# ---- torch -----------------------------------------------------------------------------------------------------------


def load_torch(
    source: Source, threads: int | None = None, modules: Mapping[str, str] | None = None
) -> LoadedModel:
    """A torch model, with files in place of some of its modules; see `open_runner`.

    Raises:
        InputError: the model or a file cannot be loaded.
    """
    loaded = load_source(source if is_huggingface(str(source.model)) else replace(source, task=None))
    for path, file in (modules or {}).items():
        if loaded.module is None:
            raise InputError(f"--module {path}: {loaded.source} is a program, in which modules are no parts any more")
        run_from_file(loaded.module, path, file, threads)
    return loaded


def runner_of(loaded: LoadedModel, name: str) -> Runner:
    """A loaded model as a runner; `name` is for messages."""
    runner = _program_runner(loaded, name) if loaded.exported is not None else _module_runner(loaded, name)
    config = getattr(loaded.module, "config", None)
    return replace(runner, preprocessing=loaded.preprocessing, tokenizer=loaded.tokenizer, task=loaded.task,
                   labels=read_labels(getattr(config, "id2label", None)))


def _module_runner(loaded: Any, source: str) -> Runner:
    from repquant_fx.frontends import signature

    module, named = loaded.module.eval(), getattr(loaded, "input_names", None)
    names = named or _positional_names(module, len(loaded.example_inputs))
    axes = getattr(loaded, "dynamic_axes", None) or ({0: "batch"},) * len(names)
    specs = []
    for name, example in zip(names, loaded.example_inputs):
        # of images every dimension but the batch is as in the example; the length of a text is free
        shape = (None, *example.shape[1:]) if example.ndim > 2 else (None,) * example.ndim
        limits = (signature.vocabulary(module), signature.positions(module)) if name == "input_ids" else (None, None)
        specs.append(InputSpec(name, shape, example.dtype, *limits))

    def call(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        with loaded.guard, torch.inference_mode():
            return _named(module(**feed) if named else module(*feed.values()))

    return Runner(call, tuple(specs), tuple(free.get(0) for free in axes), source)


def _program_runner(loaded: Any, source: str) -> Runner:
    program: torch.export.ExportedProgram = loaded.exported
    module, structure = program.module(check_guards=False), program.call_spec.in_spec
    users = set(program.graph_signature.user_inputs)
    specs, batches = [], []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, Tensor):
            specs.append(
                InputSpec(
                    node.name, tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype
                )
            )
            batches.append(
                (value.shape[0] if isinstance(value.shape[0], int) else str(value.shape[0])) if value.ndim else None
            )

    def call(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        args, kwargs = (
            pytree.tree_unflatten(list(feed.values()), structure) if structure is not None else (feed.values(), {})
        )
        with loaded.guard, torch.inference_mode():
            return _named(module(*args, **kwargs))

    return Runner(call, tuple(specs), tuple(batches), source)


def _positional_names(module: torch.nn.Module, count: int) -> tuple[str, ...]:
    """Names of the first parameters of `forward`."""
    names = [name for name, parameter in inspect.signature(module.forward).parameters.items()
             if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    return tuple(names[i] if i < len(names) else f"input_{i}" for i in range(count))


def _named(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a result by name: a record's fields, `output_0`... of a sequence, `output` of a tensor."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, (tuple, list)):
        outputs = {f"output_{i}": value for i, value in enumerate(outputs)}
    elif not isinstance(outputs, Mapping):
        outputs = getattr(outputs, "__dict__", {})
    return {str(name): value for name, value in outputs.items() if isinstance(value, Tensor)}
