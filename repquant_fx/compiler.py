"""The compiler: one function that runs the whole way, frontend to checked ONNX file.

    from repquant_fx import Recipe, compile
    compiled = compile("model.pt2", "images/", Recipe(wbits=4, abits=4))
    compiled.save("model.onnx")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx import device as devices
from repquant_fx import log
from repquant_fx import parity as parity_check
from repquant_fx import report as reports
from repquant_fx.audit import Product, audit
from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.checkpoint import Checkpoint, fingerprint, open_checkpoint
from repquant_fx.compiled import CompiledModel
from repquant_fx.distributed import World
from repquant_fx.evaluation.decoder import half_way
from repquant_fx.evaluation.runners import proto_runner
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.dynamic_shapes import dynamic_shapes
from repquant_fx.exporters.metadata import describe, record
from repquant_fx.exporters.onnx_qdq import export_onnx
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.frontends.companions import companions
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.frontends.memory import left_as_found
from repquant_fx.frontends.past import is_cache, output_name
from repquant_fx.named_runtime import RuntimeCheck, check_in_runtime
from repquant_fx.offload import on_disk
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.passes.base import LeftAlone, own_tensors, run_pass, run_passes, shared_copy
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.install_decision import installed_weights
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.match_sites import Plan
from repquant_fx.passes.runtime_form import optimize_for_runtime
from repquant_fx.passes.store_caches import stored_as
from repquant_fx.pipeline import Quantized, equalize_layers, quantize_sequentially, reconstruct, rotate
from repquant_fx.pipeline.padding import find_padding
from repquant_fx.pipeline.reconstruction import Reconstructed
from repquant_fx.pipeline.rotation import Trial
from repquant_fx.preparation import HELD_BACK, Prepared, check_runs, prepare
from repquant_fx.recipe import Recipe, RecipeLike
from repquant_fx.statistics import Statistics
from repquant_fx.targets import DEFAULT, Target, find
from repquant_fx.version import VERSION

__all__ = ["CompiledModel", "compile", "compile_model"]

Batch = tuple[Tensor, ...]


@left_as_found
def compile(
    model: str | Path | nn.Module | torch.export.ExportedProgram | LoadedModel,
    calibration: str | Path | Callable[[], Any] | Iterable[Any] | Tensor | None = None,
    recipe: RecipeLike | None = None, *,
    arch: str | None = None, input_shape: Sequence[int] | None = None, allow_pickle: bool = False,
    task: str | None = None, example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    offload_dir: str | Path | None = None,
    samples: int | None = None, batch_size: int = 32, seed: int = 0, seq_len: int | None = None,
    tokenizer: Any | None = None,
    check: bool = True, work_dir: str | Path | None = None, distributed: bool = False,
    device: str | torch.device = "cpu", statistics: bool = False, module: str | None = None,
    target: str = DEFAULT, opset: int | None = None, with_past: bool | None = None,
    external_data: bool = False,
) -> CompiledModel:
    """Quantize a model and write it as ONNX QDQ.

    Args:
        model: a module, an ExportedProgram, or what the command line takes (a file, a transformers directory, `hf:ID`,
            `timm:NAME`).
        calibration: an image folder, an array or text file, `module:callable`, tensors, or a callable (see
            `calibration.data`). Where None the example inputs stored in the model file, else inputs synthesised from
            the model, with a warning.
        recipe: bits and method, or a mapping or file that says them; RepQuant at W8A8 where None.
        arch, input_shape, allow_pickle, task: see `frontends.loading.load_model`.
        example_inputs: what a module is captured with, positional or by name, batch at least 2. Needed for a module
            whose input shape cannot be told from its own configuration.
        offload_dir: a folder for the calibration data's values between segments; the weights of a transformers
            directory stay in their files. Both are kept in memory where None.
        samples, batch_size, seed: how many calibration samples (128 of text and 1024 of anything else where None), how
            many at a time, and which.
        seq_len: tokens of a calibration sequence; as long as the example inputs (128 where the model takes so many)
            where None. The compiled model takes any length.
        tokenizer: of transformers, or a directory that holds one, for calibration text; the model's own where None.
        check: run ONNX Runtime on held-back samples and compare with the FX reference.
        work_dir: a folder to keep what was decided about each group of layers; the same compile resumes from it.
        distributed: share the work with the other processes of the default process group of torch.distributed. Each
            must call this with the same arguments, and each gets the same model (`parity` on rank 0 alone).
        device: where calibration, clipping and GPTQ compute, such as `cuda`. Codes may differ from the CPU's where
            rounding does.
        module: the path of a module in the model, such as `backbone`: it alone is compiled, on what reaches it when the
            whole runs on the example inputs and the calibration data. Layers of the recipe are named from there.
        statistics: keep what the page of `CompiledModel.html` draws of each layer. The model is the same.
        target, opset: the runtime that the file is for, by its name in `targets.TARGETS`, and the opset of its
            operators where it shall be another than the target's.
        with_past: the file of a causal language model of transformers decodes with a key/value cache (see
            `frontends.past`), or computes the logits of whole sequences where False. Where None it decodes if the model
            keeps such a cache; the report's notes say why where it does not.
        external_data: `CompiledModel.save` writes matrices into a data file beside the model (see `exporters.apart`),
            as it does past 1.5 GB unasked.

    Raises:
        InputError: something given cannot be used (its subclasses say what).
        ParityError: the exported model disagrees with the FX reference beyond float rounding.
    """
    return compile_model(
        Source(model, arch, input_shape, allow_pickle, task, example_inputs, offload_dir, module),
        Calibration(calibration, samples, batch_size, seed, seq_len, tokenizer), recipe,
        Run(check, work_dir, distributed, device, statistics, target, opset, with_past, external_data))


def compile_model(
    source: Source, calibration: Calibration, recipe: RecipeLike | None = None, run: Run | None = None, *,
    out: Path | None = None,
) -> CompiledModel:
    """`compile`, of what it was given as objects. A module is put in eval mode, and torch's random state moves on.

    Args:
        out: where the result will be written, where that is known: a disk without room for it is an error at once.

    Raises:
        InputError, ParityError: as `compile` does.
    """
    run = run or Run()
    log.start()
    devices.usable(run.device)
    recipe = find(run.target, run.opset).recipe(Recipe.of(recipe))
    return compile_prepared(prepare(source, calibration, recipe, run, out), source, calibration, run)


def compile_prepared(prepared: Prepared, source: Source, calibration: Calibration, run: Run) -> CompiledModel:
    """`compile_model`, of a model that is loaded, captured and has its data.

    Args:
        prepared: with the recipe of the target; its graph is rewritten in place.
        source, calibration, run: that it was prepared of.

    Raises:
        InputError, ParityError: as `compile` does.
    """
    device, target = devices.usable(run.device), find(run.target, run.opset)
    notes = [*prepared.notes, *_notes(source, prepared.graph_module), *filter(None, [prepared.data.notes])]
    calibrating, held_back = prepared.data.split_held_back(HELD_BACK)
    check_runs(prepared.graph_module, [*calibrating.batches, *held_back.batches])
    log.stage("quantize")
    rewritten = _quantize(prepared, list(calibrating.batches), source, calibration, run, device)
    log.stage("export")
    probe = _probe(held_back, prepared.captured.dynamic_batch)
    exported = _export(prepared, rewritten, probe, target)
    log.stage("check")
    check = run.check and rewritten.rank == 0
    parity, kernels, named = _check(prepared, rewritten, exported, probe, target) if check else (None, None, None)
    log.finish()
    report = reports.build(
        layers=exported.layers,
        plan=rewritten.plan,
        quantized=rewritten.quantized,
        sqnr=exported.sqnr,
        output_sqnr=exported.output_sqnr,
        parity=parity,
        kernels=kernels,
        named=named,
        notes=notes,
        runtime_form=exported.left_alone,
        about=_about(
            prepared, rewritten, exported, calibration, calibrating.samples, held_back.samples, target.name
        ),
    )
    for each in (parity, named.parity if named is not None else None):
        if each is not None:
            each.raise_on_problems()
    model = exported.model
    if not isinstance(source.model, (str, Path)):  # the caller may go on training
        own_tensors(rewritten.graph_module)
        model = model.owned()
    statistics = rewritten.statistics.to_dict() if rewritten.statistics is not None else None
    return CompiledModel(model, report, rewritten.graph_module, exported.quantizers, parity,
                         companions(prepared.loaded, calibration.tokenizer), statistics, run.external_data)


def _notes(source: Source, graph_module: GraphModule) -> list[str]:
    """What is done otherwise than asked for; sentences for the report."""
    weights = [*graph_module.parameters(), *graph_module.buffers()]
    if source.offload_dir is None or on_disk(weights):
        return []
    return ["all weights were held in memory, the offload directory kept values between layers alone: weights stay in "
            "their files where a transformers directory has them as safetensors, under the names and in the shapes of "
            "its model"]


@dataclass(frozen=True)
class _Rewritten:
    """The graph with quantizers in it, and what was decided on the way.

    Attributes:
        float_graph: the float graph that it stands for, after equalization.
        rotations: what was tried, and made where it paid.
        blocks: what was reconstructed.
        rank: of this process among those that share the work.
    """

    graph_module: GraphModule
    float_graph: GraphModule
    plan: Plan
    quantized: Quantized
    statistics: Statistics | None
    rotations: list[Trial]
    blocks: list[Reconstructed]
    rank: int


def _quantize(
    prepared: Prepared, batches: list[Batch], source: Source, calibration: Calibration, run: Run, device: torch.device
) -> _Rewritten:
    """Rewrite the prepared graph in place, layer by layer, on a device; what is returned is back on the CPU."""
    graph_module, recipe = prepared.graph_module, prepared.recipe
    statistics = Statistics() if run.statistics else None
    with _checkpoint(prepared, batches, calibration.seed, run) as checkpoint:
        devices.move(graph_module, device)
        batches = devices.move_batches(batches, device)
        padding = find_padding(graph_module, batches)
        with log.part("rotate"):
            trials = rotate(graph_module, prepared.plan, batches, recipe, checkpoint, calibration.seed)
        with log.part("equalize layers"):
            plan = equalize_layers(graph_module, prepared.plan, batches, recipe, checkpoint, padding)
        float_graph = shared_copy(graph_module)
        run_passes(graph_module, [InsertObservers(plan, len(batches))])
        quantized = quantize_sequentially(graph_module, plan, batches, recipe, checkpoint, source.offload_dir,
                                          statistics, padding)
        with log.part("reconstruct"):
            blocks = reconstruct(graph_module, float_graph, plan, quantized, batches, recipe.reconstruct,
                                 calibration.seed, checkpoint, source.offload_dir, padding)
    for each in (graph_module, float_graph):
        devices.move(each, torch.device("cpu"))
    return _Rewritten(graph_module, float_graph, plan, quantized, statistics, trials, blocks, checkpoint.world.rank)


@contextmanager
def _checkpoint(prepared: Prepared, batches: list[Batch], seed: int, run: Run) -> Iterator[Checkpoint]:
    """Where decisions are kept, and which processes work together. The fingerprint is taken only for one of the two."""
    if run.work_dir is None and not run.distributed:
        yield Checkpoint()
        return
    world = World.current() if run.distributed else World()
    digest = fingerprint(prepared.graph_module, batches, prepared.recipe, seed)
    world.check_equal(digest)
    about = {"repquant_fx": VERSION, "source": prepared.loaded.source, "seed": seed,
             "recipe": prepared.recipe.to_dict()}
    with open_checkpoint(run.work_dir, digest, about, world) as checkpoint:
        yield checkpoint


def _probe(held_back: CalibrationSet, dynamic_batch: bool) -> list[Tensor]:
    """The held-back samples as one batch; of a model whose batch is fixed the first one."""
    if not dynamic_batch:
        return list(held_back.batches[0])
    return [torch.cat(tensors) for tensors in zip(*held_back.batches)]


@dataclass(frozen=True)
class _Exported:
    """The file, and what was measured of its graph.

    Attributes:
        quantizers: nodes of the lowered graph that produce codes, by site name.
        layers: the report's entries.
        sqnr: in dB against the float graph, by node; output_sqnr: of the worst output.
        caches: how keys and values are kept; see `StoreCaches`.
        left_alone: what was not brought into the form that runs fastest, and why.
    """

    model: OnnxModel
    quantizers: dict[str, Node]
    layers: list[dict[str, Any]]
    sqnr: dict[str, float]
    output_sqnr: float
    caches: dict[str, dict[str, Any]]
    left_alone: tuple[LeftAlone, ...]


def _export(prepared: Prepared, rewritten: _Rewritten, probe: list[Tensor], target: Target) -> _Exported:
    """Lower the graph in place, measure what ships on the held-back samples, and write it as ONNX."""
    graph_module, captured, recipe = rewritten.graph_module, prepared.captured, prepared.recipe
    # before lowering, while the quantizers are modules
    layers = reports.describe_layers(graph_module, rewritten.plan, rewritten.quantized, gptq=recipe.gptq)
    lowering = LowerToQDQ(rewritten.plan, installed_weights(graph_module, rewritten.plan), flat=target.flat)
    lowered = run_pass(graph_module, lowering)
    shipped = optimize_for_runtime(graph_module, lowered.quantizers, adjacent=recipe.container == "int4",
                                   flat=target.flat, float_caches=recipe.cache == "float" or recipe.weight_only)
    names = [entry["node"] for entry in layers]
    sqnr = reports.layer_sqnr(rewritten.float_graph, graph_module, names, probe, shipped.codes)
    stored = partial(stored_as, graph_module)
    with torch.no_grad():
        outputs, expected = tensors_in(graph_module(*stored(probe))), tensors_in(rewritten.float_graph(*probe))
    counted = reports.counted_outputs(rewritten.float_graph, probe)
    output_sqnr = min(map(parity_check.sqnr, outputs, expected, counted))  # of caches the float graph gives none
    layer_record = record(layers, rewritten.plan.left_alone, lowered.constants)
    caches = dict(zip(filter(is_cache, captured.input_names), shipped.caches.values()))
    model = export_onnx(graph_module, stored(prepared.loaded.example_inputs), input_names=captured.input_names,
                        output_names=[*captured.output_names, *map(output_name, caches)],
                        dynamic_shapes=dynamic_shapes(graph_module),
                        metadata=describe(recipe, prepared.loaded.preprocessing, layer_record, target.name),
                        container=recipe.container, target=target)
    return _Exported(model, shipped.quantizers, layers, sqnr, output_sqnr, caches,
                     (*lowering.left_alone, *shipped.left_alone))


def _check(
    prepared: Prepared, rewritten: _Rewritten, exported: _Exported, probe: list[Tensor], target: Target
) -> tuple[parity_check.Parity, list[Product], RuntimeCheck | None]:
    """The file in ONNX Runtime against the lowered graph, which products it computes with integers, and the file in the
    runtime of its target, where that is another one."""
    names = prepared.captured.input_names
    probe = stored_as(rewritten.graph_module, probe)
    if exported.caches:
        fed = half_way(proto_runner(exported.model, "the exported file"), *probe[:2])
        probe = [fed[name] for name in names]
    parity = parity_check.compare(rewritten.graph_module, exported.model, exported.quantizers, probe, names)
    named = check_in_runtime(target.runtime, rewritten.graph_module, exported.model, exported.quantizers, probe, names,
                             prepared.captured.dynamic_batch)
    return parity, audit(exported.model), named


def _about(
    prepared: Prepared, rewritten: _Rewritten, exported: _Exported, calibration: Calibration, samples: int,
    held_back: int, target: str
) -> dict[str, Any]:
    """What the report says of the whole compile."""
    captured, data, recipe = prepared.captured, prepared.data, prepared.recipe
    return {
        "repquant_fx": VERSION, "source": prepared.loaded.source, "bits": recipe.bits,
        "target": target, "recipe": recipe.to_dict(),
        **({"rotations": [trial.to_dict() for trial in rewritten.rotations]} if recipe.rotate else {}),
        **({"reconstruction": [block.to_dict() for block in rewritten.blocks]} if recipe.reconstruct else {}),
        "calibration": {"origin": data.origin, "samples": samples, "held_back": held_back, "synthetic": data.synthetic,
                        "seed": calibration.seed},
        "capture": {"difference_from_eager": captured.eager_difference, "dynamic_batch": captured.dynamic_batch},
        **({"caches": exported.caches} if exported.caches else {}),
        "file_bytes": exported.model.size(), "peak_memory_mb": log.peak_memory(), "seconds": log.spent(),
        "peaks_mb": log.peaks(),
    }
