"""The compiler: one function that runs the whole way, frontend to checked ONNX file.

    from repquant_fx import Recipe, compile
    compiled = compile("model.pt2", "images/", Recipe(wbits=4, abits=4))
    compiled.save("model.onnx")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx import device as devices
from repquant_fx import log
from repquant_fx import parity as parity_check
from repquant_fx import report as reports
from repquant_fx.audit import audit
from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.text import TEXT_SAMPLES, Tokenization
from repquant_fx.checkpoint import Checkpoint, fingerprint, open_checkpoint
from repquant_fx.distributed import World
from repquant_fx.errors import InputError, RepQuantWarning
from repquant_fx.exporters.metadata import describe, record
from repquant_fx.exporters.onnx_qdq import export_onnx
from repquant_fx.files import MODEL, check_directory, check_writable, is_directory, write_directory, write_together
from repquant_fx.frontends import huggingface, signature
from repquant_fx.frontends.capture import AXES, Captured, capture, tensors_in
from repquant_fx.frontends.companions import companions
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.frontends.memory import from_memory, left_as_found
from repquant_fx.frontends.tokenizer import load_tokenizer
from repquant_fx.offload import on_disk
from repquant_fx.passes.base import aten, module_path, own_tensors, run_pass, run_passes, shared_copy
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.match_sites import MatchSites, Plan
from repquant_fx.passes.normal_form import normalize
from repquant_fx.passes.runtime_form import optimize_for_runtime
from repquant_fx.pipeline import absorb_scales, quantize_sequentially
from repquant_fx.recipe import LayerRule, Recipe, RecipeLike
from repquant_fx.statistics import Statistics
from repquant_fx.torch_private import largest_size
from repquant_fx.version import VERSION

CONSUMERS = {aten.linear.default, aten.conv2d.default, aten.matmul.default, aten.bmm.default}
HELD_BACK = 16  # samples kept out of calibration for the check
IMAGE_SAMPLES = 1024


@dataclass
class CompiledModel:
    """The result of `compile`.

    Attributes:
        proto: the ONNX model.
        report: what was done and measured; JSON data (see `report.build`).
        graph_module: the lowered graph, the FX reference of the file.
        quantizers: nodes of `graph_module` that produce codes, by site name.
        parity: the comparison with ONNX Runtime, None if it was not asked for.
        companions: what belongs beside the file in a directory (configuration, tokenizer, processor), by name.
        statistics: what the page of `html` draws of each layer, JSON data; None if it was not asked for.
    """

    proto: onnx.ModelProto
    report: dict[str, Any]
    graph_module: GraphModule
    quantizers: dict[str, Node]
    parity: parity_check.Parity | None
    companions: dict[str, bytes] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The file's bytes; the same model, data, recipe and seed give the same bytes."""
        return self.proto.SerializeToString(deterministic=True)

    def save(self, path: str | Path, *, force: bool = False, report: str | Path | None = None, html: str | Path | None = None,
             command: str | None = None) -> Path:
        """Write the model, and the report as JSON or as a page where paths are given. Complete or not at all.

        Args:
            path: a file where it ends in `.onnx`; else a directory, which gets `model.onnx` and `companions`.
            html, command: where the page goes, and see `html`.

        Returns:
            where the model was written.

        Raises:
            OutputError: a file exists and `force` is not set, or it cannot be written.
            InputError: the page needs plotly, which is not installed.
        """
        extras: dict[Path, bytes] = {}
        if report is not None:
            extras[Path(report)] = self.report_json().encode()
        if html is not None:
            extras[Path(html)] = self.html(command).encode()
        if is_directory(path):
            inside = [p for p in extras if p.parent.resolve() == Path(path).resolve()]  # these become files of the directory
            files = {**self.companions, **{p.name: extras[p] for p in inside}, MODEL: self.to_bytes()}
            path = check_directory(path, files, force)
            write_directory(path, files, {check_writable(p, force): data for p, data in extras.items() if p not in inside})
            return path / MODEL
        path = check_writable(path, force)
        write_together({path: self.to_bytes(), **{check_writable(p, force): data for p, data in extras.items()}})
        return path

    def html(self, command: str | None = None) -> str:
        """The report as one self-contained page. Its figures of single layers need a model compiled with `statistics=True`.

        Args:
            command: the command line that made the model, where one did.

        Raises:
            InputError: plotly is not installed.
        """
        from repquant_fx.html import page

        return page(self.report, self.statistics, command=command)

    def report_json(self) -> str:
        """The report as indented JSON, with the statistics where they were collected."""
        kept = {} if self.statistics is None else {"statistics": self.statistics}
        return json.dumps({**self.report, **kept}, indent=2, sort_keys=False) + "\n"

    def session(self, threads: int | None = None) -> Any:
        """An ONNX Runtime session on the model."""
        from repquant_fx.runtime import session

        return session(self.to_bytes(), threads=threads)


@left_as_found
def compile(
    model: str | Path | nn.Module | torch.export.ExportedProgram | LoadedModel,
    calibration: str | Path | Callable[[], Any] | Iterable[Any] | Tensor | None = None, recipe: RecipeLike | None = None, *,
    samples: int | None = None, batch_size: int = 32, seed: int = 0, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    arch: str | None = None, input_shape: Sequence[int] | None = None, allow_pickle: bool = False, check: bool = True,
    task: str | None = None, seq_len: int | None = None, tokenizer: Any | None = None, work_dir: str | Path | None = None,
    offload_dir: str | Path | None = None, distributed: bool = False, device: str | torch.device = "cpu", statistics: bool = False,
) -> CompiledModel:
    """Quantize a model and write it as ONNX QDQ.

    Args:
        model: a module, an ExportedProgram, or what the command line takes (a file, a transformers directory, `hf:ID`, `timm:NAME`).
        recipe: bits and method, or a mapping or file that says them; RepQuant at W8A8 where None.
        calibration: an image folder, an array or text file, `module:callable`, tensors, or a callable (see `calibration.data`).
            Where None the example inputs stored in the model file, else made-up inputs, with a warning.
        samples, batch_size, seed: how many calibration samples (128 of text and 1024 of anything else where None), how many at a
            time, and which.
        example_inputs: what a module is captured with, positional or by name, batch at least 2. Needed for a module whose input
            shape cannot be told from its own configuration.
        arch, input_shape, allow_pickle, task: see `frontends.loading.load_model`.
        seq_len: tokens of a calibration sequence; as long as the example inputs (128 where the model takes so many) where None. The
            compiled model takes any length.
        tokenizer: of transformers, or a directory that holds one, for calibration text; the model's own where None.
        check: run ONNX Runtime on held-back samples and compare with the FX reference.
        work_dir: a folder to keep what was decided about each group of layers; the same compile goes on from there.
        offload_dir: a folder for the calibration data's values between segments; the weights of a transformers directory stay in their files.
            Both are kept in memory where None.
        device: where calibration, clipping and GPTQ compute, such as `cuda`. Codes may differ from the CPU's where rounding does.
        distributed: share the work with the other processes of the default process group of torch.distributed. Each must call this
            with the same arguments, and each gets the same model (`parity` on rank 0 alone).
        statistics: keep what the page of `CompiledModel.html` draws of each layer. The model is the same.

    Raises:
        InputError: something given cannot be used (its subclasses say what).
        ParityError: the exported model disagrees with the reference beyond float rounding.
    """
    log.start()
    there = devices.usable(device)
    prepared = prepare(model, calibration, recipe, samples=samples, batch_size=batch_size, seed=seed, example_inputs=example_inputs, arch=arch,
                       input_shape=input_shape, allow_pickle=allow_pickle, task=task, seq_len=seq_len, tokenizer=tokenizer,
                       offload_dir=offload_dir)
    loaded, captured, recipe, data = prepared.loaded, prepared.captured, prepared.recipe, prepared.data
    graph_module, plan = prepared.graph_module, prepared.plan
    notes = []
    if offload_dir is not None and not on_disk([*graph_module.parameters(), *graph_module.buffers()]):
        notes.append("all weights were held in memory, the offload directory kept values between layers alone: weights stay in their files where "
                     "a transformers directory has them as safetensors, under the names and in the shapes of its model")
    used, held_back = data.split_held_back(HELD_BACK)
    batches = list(used.batches)
    collected = Statistics() if statistics else None
    log.stage("quantize")
    with _checkpoint(graph_module, batches, recipe, seed, loaded.source, work_dir, distributed) as checkpoint:
        devices.move(graph_module, there)
        batches = devices.move_batches(batches, there)
        with log.part("absorb scales"):
            plan = absorb_scales(graph_module, plan, batches, recipe, checkpoint)
        reference = shared_copy(graph_module)
        run_passes(graph_module, [InsertObservers(plan, len(batches))])
        quantized = quantize_sequentially(graph_module, plan, batches, recipe, checkpoint, offload_dir, collected)
    for each in (graph_module, reference):
        devices.move(each, torch.device("cpu"))
    quantized.weights = {node: weight.to("cpu") for node, weight in quantized.weights.items()}
    layers = reports.describe_layers(graph_module, plan, quantized, gptq=recipe.gptq)
    log.stage("export")
    lowering = LowerToQDQ(plan, quantized.weights)
    run_passes(graph_module, [lowering])
    probe = [torch.cat(tensors) for tensors in zip(*held_back.batches)] if captured.dynamic_batch else list(held_back.batches[0])
    shipped = optimize_for_runtime(graph_module, lowering.quantizers, adjacent=recipe.container == "int4")
    sqnr = reports.layer_sqnr(reference, graph_module, [e["node"] for e in layers], probe, shipped.codes)
    with torch.no_grad():
        output_sqnr = min(parity_check.sqnr(a, b) for a, b in zip(tensors_in(graph_module(*probe)), tensors_in(reference(*probe))))
    metadata = describe(recipe, loaded.preprocessing, record(layers, plan.left_alone, lowering.constants))
    proto = export_onnx(graph_module, loaded.example_inputs, input_names=captured.input_names, output_names=captured.output_names,
                        dynamic_shapes=dynamic_shapes(graph_module), metadata=metadata, container=recipe.container)
    log.stage("check")
    check = check and checkpoint.world.rank == 0
    parity = parity_check.compare(graph_module, proto, lowering.quantizers, probe, captured.input_names) if check else None
    kernels = audit(proto) if check else None
    log.finish()
    report = reports.build(
        layers=layers, plan=plan, quantized=quantized, sqnr=sqnr, output_sqnr=output_sqnr, parity=parity,
        kernels=kernels, notes=notes, runtime_form=(*lowering.left_alone, *shipped.left_alone),
        about={
            "repquant_fx": VERSION, "source": loaded.source, "bits": f"W{recipe.wbits}A{recipe.abits}", "recipe": recipe.to_dict(),
            "calibration": {"origin": data.origin, "samples": used.samples, "held_back": held_back.samples,
                            "synthetic": data.synthetic, "seed": seed},
            "capture": {"difference_from_eager": captured.eager_difference, "dynamic_batch": captured.dynamic_batch},
            "file_bytes": proto.ByteSize(), "peak_memory_mb": log.peak_memory(), "seconds": log.spent(), "peaks_mb": log.peaks(),
        })
    if parity is not None:
        parity.raise_on_problems()
    if not isinstance(model, (str, Path)):
        own_tensors(graph_module)  # the caller may go on training
    return CompiledModel(proto, report, graph_module, lowering.quantizers, parity, companions(loaded, tokenizer),
                         collected.to_dict() if collected is not None else None)


@dataclass(frozen=True)
class Matched:
    """A model in normal form and what the recipe, completed by the rules that the model brings, quantizes of it."""

    loaded: LoadedModel
    captured: Captured
    graph_module: GraphModule
    plan: Plan
    recipe: Recipe


def match(
    model: str | Path | nn.Module | torch.export.ExportedProgram | LoadedModel, recipe: RecipeLike | None = None, *,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None, arch: str | None = None, input_shape: Sequence[int] | None = None,
    allow_pickle: bool = False, task: str | None = None, offload_dir: str | Path | None = None,
) -> Matched:
    """The first part of `compile`: load, capture, bring into normal form, match. Nothing is calibrated.

    Raises:
        InputError: the model cannot be loaded or captured.
    """
    recipe = Recipe.of(recipe)
    log.stage("load")
    loaded = _load(model, example_inputs, arch, input_shape, allow_pickle, task, offload_dir)
    given = tuple(rule for rule in recipe.layers if rule.match not in loaded.float_modules)
    # the recipe's own rules come later, so they win; a recipe that was stored in a file has these rules already
    own = tuple(rule for rule in (LayerRule(glob, skip=True) for glob in loaded.float_modules) if rule not in recipe.layers)
    recipe = replace(recipe, layers=(*own, *recipe.layers))
    log.stage("capture")
    with loaded.guard:
        captured = _capture(loaded)
        graph_module = normalize(captured.graph_module)
        plan = run_pass(graph_module, MatchSites(recipe))
    for sentence in replace(recipe, layers=given).unmatched([module_path(n) for n in graph_module.graph.nodes if n.target in CONSUMERS]):
        warnings.warn(f"the recipe's {sentence}", RepQuantWarning, stacklevel=2)
    return Matched(loaded, captured, graph_module, plan, recipe)


@dataclass(frozen=True)
class Prepared(Matched):
    """A matched model and the data to calibrate it with; nothing is rewritten yet."""

    data: CalibrationSet


def prepare(
    model: str | Path | nn.Module | torch.export.ExportedProgram | LoadedModel,
    calibration: str | Path | Callable[[], Any] | Iterable[Any] | Tensor | None = None, recipe: RecipeLike | None = None, *,
    samples: int | None = None, batch_size: int = 32, seed: int = 0, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    arch: str | None = None, input_shape: Sequence[int] | None = None, allow_pickle: bool = False, task: str | None = None,
    seq_len: int | None = None, tokenizer: Any | None = None, offload_dir: str | Path | None = None,
) -> Prepared:
    """Match, and read the calibration data: what every analysis starts from. Arguments are those of `compile`.

    Raises:
        InputError: the model or the data cannot be used, or there is nothing to quantize.
    """
    torch.manual_seed(seed)
    matched = match(model, recipe, example_inputs=example_inputs, arch=arch, input_shape=input_shape, allow_pickle=allow_pickle, task=task,
                    offload_dir=offload_dir)
    plan = matched.plan
    if not plan.groups:
        reasons = "; ".join(f"{item.operator} at {item.path}: {item.reason}" for item in plan.left_alone[:3])
        raise InputError("nothing to quantize: the graph has no Linear, convolution or matrix product that the recipe does not skip"
                         + (f" ({reasons})" if reasons else ""))
    log.stage("calibration data")
    data = _calibration_data(matched.captured, matched.loaded, calibration, samples, batch_size, seed, seq_len, tokenizer)
    return Prepared(**vars(matched), data=data)


@contextmanager
def _checkpoint(
    graph_module: GraphModule, batches: list[tuple[Tensor, ...]], recipe: Recipe, seed: int, source: str,
    work_dir: str | Path | None, distributed: bool,
) -> Iterator[Checkpoint]:
    """Where decisions are kept, and which processes work together; the fingerprint is taken only where one of them needs it."""
    if work_dir is None and not distributed:
        yield Checkpoint()
        return
    world = World.current() if distributed else World()
    digest = fingerprint(graph_module, batches, recipe, seed)
    world.check_equal(digest)
    about = {"repquant_fx": VERSION, "source": source, "seed": seed, "recipe": recipe.to_dict()}
    with open_checkpoint(work_dir, digest, about, world) as checkpoint:
        yield checkpoint


def _load(model: Any, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None, arch: str | None,
          input_shape: Sequence[int] | None, allow_pickle: bool, task: str | None, offload_dir: str | Path | None) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, (str, Path)):
        return load_model(model, arch=arch, allow_pickle=allow_pickle, input_shape=input_shape, task=task, offload_dir=offload_dir)
    return from_memory(model, example_inputs=example_inputs, input_shape=input_shape, task=task)


def _capture(loaded: LoadedModel) -> Captured:
    model = loaded.module if loaded.module is not None else loaded.exported
    assert model is not None
    return capture(model, loaded.example_inputs, input_names=loaded.input_names, dynamic_axes=loaded.dynamic_axes, outputs=loaded.outputs)


def input_specs(captured: Captured, module: nn.Module | None = None) -> list[InputSpec]:
    """Name, shape and dtype of each input of a captured graph, and the limits that `module` sets to token ids."""
    specs = []
    for node, name in zip((n for n in captured.graph_module.graph.nodes if n.op == "placeholder"), captured.input_names):
        value = node.meta["val"]
        limits = (signature.vocabulary(module), signature.positions(module)) if name == "input_ids" else (None, None)
        specs.append(InputSpec(name, tuple(d if isinstance(d, int) else None for d in value.shape), value.dtype, *limits))
    return specs


def _calibration_data(captured: Captured, loaded: LoadedModel, calibration: Any, samples: int | None, batch_size: int, seed: int,
                      seq_len: int | None, tokenizer: Any) -> CalibrationSet:
    specs = input_specs(captured, loaded.module)
    text = _tokenization(loaded, seq_len, tokenizer)
    if samples is None:
        samples = TEXT_SAMPLES if text is not None else IMAGE_SAMPLES
    return load_calibration(calibration, specs, preprocessing=loaded.preprocessing, samples=samples, batch_size=batch_size, seed=seed,
                            example_inputs=loaded.example_inputs if loaded.inputs_are_data else None, text=text)


def _tokenization(loaded: LoadedModel, seq_len: int | None, tokenizer: Any) -> Tokenization | None:
    """How text becomes the model's inputs; None for a model that takes no token ids."""
    ids = next((t for t in loaded.example_inputs if t.ndim == 2 and t.dtype in (torch.int64, torch.int32)), None)
    if ids is None:
        if seq_len is not None or tokenizer is not None:
            raise InputError(f"{'a sequence length' if seq_len is not None else 'a tokenizer'} was given, but {loaded.source} takes no token ids")
        return None
    longest = signature.positions(loaded.module)
    if seq_len is not None and not 1 <= seq_len <= (longest or seq_len):
        raise InputError(f"--seq-len {seq_len}: expected 1 to {longest} tokens" if longest else f"--seq-len {seq_len}: expected at least 1 token")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(huggingface.find_directory(str(tokenizer)))
    return Tokenization(tokenizer if tokenizer is not None else loaded.tokenizer, seq_len or int(ids.shape[1]), loaded.task == "causal-lm")


def dynamic_shapes(graph_module: GraphModule) -> tuple[dict[int, Any] | None, ...] | None:
    """What torch.export needs to keep the symbolic dimensions of a captured graph symbolic, under the names they were given."""
    dims: dict[str, Any] = {}
    shapes: list[dict[int, Any] | None] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            sizes = node.meta["val"].shape
            free = {axis: dims.setdefault(name, torch.export.Dim(name, min=1, max=largest_size(sizes[axis])))
                    for axis, name in node.meta[AXES].items()}
            shapes.append(free or None)
    return tuple(shapes) if dims else None
