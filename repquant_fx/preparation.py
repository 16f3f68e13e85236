"""What comes before anything is rewritten: load, capture, bring into normal form, match, read the calibration data.

Compiling, the analysis of sensitivity and the preview of a model all start here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx import log
from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.text import TEXT_SAMPLES, Tokenization, frame_of
from repquant_fx.checkpoint import Checkpoint, graph_digest, open_cache
from repquant_fx.distributed import World
from repquant_fx.errors import CalibrationError, ExportError, InputError, RepQuantWarning, first_line
from repquant_fx.exporters.dynamic_shapes import dynamic_shapes
from repquant_fx.exporters.trial import try_translation
from repquant_fx.forecast import announce, predicted_bytes
from repquant_fx.frontends import huggingface, signature
from repquant_fx.frontends.capture import Captured, capture
from repquant_fx.frontends.loading import LoadedModel, load_source
from repquant_fx.frontends.memory import from_memory
from repquant_fx.frontends.part import part_of, proposal
from repquant_fx.frontends.past import LEAST, NoCacheError, as_decoder, may_decode
from repquant_fx.frontends.tokenizer import load_tokenizer
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.passes.base import left_alone, module_path, run_pass, run_passes, shared_copy
from repquant_fx.passes.caches import caches
from repquant_fx.passes.identity import NodeProbe
from repquant_fx.passes.insert_affine import InsertAffine
from repquant_fx.passes.match_sites import MatchSites, Plan
from repquant_fx.passes.normal_form import normalize
from repquant_fx.passes.operators import PRODUCTS
from repquant_fx.pipeline.padding import ENDS
from repquant_fx.recipe import LayerRule, Recipe, RecipeLike

HELD_BACK = 16  # samples kept out of calibration, to measure on
IMAGE_SAMPLES = 1024


@dataclass(frozen=True)
class Matched:
    """A model in normal form and what the recipe, completed by the rules that the model brings, quantizes of it.

    Attributes:
        notes: what is done otherwise than by default, as sentences.
    """

    loaded: LoadedModel
    captured: Captured
    graph_module: GraphModule
    plan: Plan
    recipe: Recipe
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared(Matched):
    """A matched model and the data to calibrate it with; nothing is rewritten yet."""

    data: CalibrationSet


def match(source: Source, recipe: RecipeLike | None = None, with_past: bool | None = False) -> Matched:
    """Load, capture, bring into normal form, match. Nothing is calibrated.

    Args:
        with_past: capture a causal language model as one that decodes with a key/value cache; where None if it keeps
            one.

    Raises:
        InputError: the model cannot be loaded or captured.
    """
    recipe = Recipe.of(recipe)
    recipe.check_together()
    log.stage("load")
    loaded = load(source)
    given = tuple(rule for rule in recipe.layers if rule.match not in loaded.float_modules)
    # the recipe's own rules come later, so they win; a recipe that was stored in a file has these rules already
    brought = (LayerRule(glob, skip=True) for glob in loaded.float_modules)
    recipe = replace(recipe, layers=(*(rule for rule in brought if rule not in recipe.layers), *recipe.layers))
    log.stage("capture")
    with loaded.guard:
        loaded, captured, notes = _capture(loaded, with_past)
        graph_module = normalize(captured.graph_module, loaded.example_inputs)
        if recipe.activation_affine and recipe.norm in ("reparameterize", "smooth"):
            run_passes(graph_module, [InsertAffine(recipe.few_bits)], NodeProbe(loaded.example_inputs))
        plan = run_pass(graph_module, MatchSites(recipe))
        plan = replace(plan, left_alone=(*plan.left_alone, *left_alone(graph_module)))
    _tell_ends(graph_module, captured, loaded)
    paths = [*(module_path(node) for node in graph_module.graph.nodes if node.target in PRODUCTS), *loaded.other_layers]
    for sentence in replace(recipe, layers=given).unmatched(paths):
        warnings.warn(f"the recipe's {sentence}", RepQuantWarning, stacklevel=2)
    return Matched(loaded, captured, graph_module, plan, recipe, notes)


def prepare(
    source: Source, calibration: Calibration, recipe: RecipeLike | None = None, run: Run | None = None,
    out: Path | None = None, data: Callable[[], CalibrationSet] | None = None,
) -> Prepared:
    """Match, and read the calibration data: what every analysis starts from.

    Args:
        run: of a compile: says where synthesised data is kept and whether a cache is wanted, which no analysis needs;
            what the file would fail by is told at once.
        out: where the file will be written, where that is known.
        data: what gives the data, where it is not what `calibration` names.

    Raises:
        InputError: the model or the data cannot be used, there is nothing to quantize, the graph has no ONNX form, or
            the disk no room for the file.
    """
    torch.manual_seed(calibration.seed)
    matched = match(source, recipe, False if run is None else run.with_past)
    if not matched.plan.groups:
        reasons = "; ".join(f"{item.operator} at {item.path}: {item.reason}" for item in matched.plan.left_alone[:3])
        raise InputError("nothing to quantize: the graph has no Linear, convolution or matrix product that the recipe "
                         "does not skip" + (f" ({reasons})" if reasons else ""))
    if run is not None:
        _look_ahead(matched, run, out)
    log.stage("calibration data")
    given = data() if data is not None else _calibration_data(matched, calibration, run or Run())
    return Prepared(**vars(matched), data=given)


def _look_ahead(matched: Matched, run: Run, out: Path | None) -> None:
    graph_module, captured = matched.graph_module, matched.captured
    with matched.loaded.guard:
        try_translation(graph_module, matched.loaded.example_inputs, input_names=captured.input_names,
                        output_names=captured.output_names, dynamic_shapes=dynamic_shapes(graph_module))
    announce(predicted_bytes(graph_module, matched.plan, matched.recipe.group_size), run.external_data, out)


def _tell_ends(graph_module: GraphModule, captured: Captured, loaded: LoadedModel) -> None:
    """Say at the input of ids that a model wrote which of them end a text; see `pipeline.padding`."""
    written = {signature.TARGET: loaded.writer.ends} if loaded.writer is not None else {"input_ids": loaded.ends}
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), captured.input_names):
        if written.get(name):
            node.meta[ENDS] = written[name]


def check_runs(graph_module: GraphModule, batches: Iterable[Sequence[Tensor]]) -> None:
    """Run the captured graph on one batch of each shape.

    Raises:
        CalibrationError: it does not run.
    """
    for batch in {str([t.shape for t in batch]): batch for batch in batches}.values():
        try:
            with torch.no_grad():
                graph_module(*batch)
        except InputError:
            raise
        except Exception as error:
            shapes, why = ", ".join(str(tuple(t.shape)) for t in batch), first_line(error)
            raise CalibrationError(f"the model does not run on calibration data of shape {shapes}: {why}; give samples "
                                   "like the example inputs, and as many of them") from error


def load(source: Source) -> LoadedModel:
    """The model of a source, from a file, by name or from memory, or the module of it that is wanted; one that is
    loaded already as it is.

    Raises:
        InputError: it cannot be loaded.
    """
    model = source.model
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, (str, Path)):
        loaded = load_source(source)
    else:
        loaded = from_memory(model, example_inputs=source.example_inputs, input_shape=source.input_shape,
                             task=source.task)
    return loaded if source.module is None else part_of(loaded, source.module)


def captured_once(source: Source) -> Source:
    """A source for several compiles without a key/value cache: its model is loaded and captured here, once.

    Raises:
        InputError: the model cannot be loaded or captured.
    """
    log.stage("load")
    loaded = load(source)
    log.stage("capture")
    with loaded.guard:
        loaded = replace(loaded, captured=_captured(loaded))
    log.finish()
    return replace(source, model=loaded, module=None)


def _capture(loaded: LoadedModel, decoding: bool | None) -> tuple[LoadedModel, Captured, tuple[str, ...]]:
    """The model as it was captured: one that decodes with a key/value cache where that is wanted, or possible and not
    unwanted (None); and a note where it is not possible.
    """
    if decoding is None and may_decode(loaded):
        try:
            return (*_decoder(loaded), ())
        except (NoCacheError, ExportError) as error:
            note = f"the file keeps no keys and values of earlier tokens: {error}"
            return loaded, _captured(loaded), (note,)
    return (*_decoder(loaded), ()) if decoding else (loaded, _captured(loaded), ())


def _decoder(loaded: LoadedModel) -> tuple[LoadedModel, Captured]:
    loaded = as_decoder(loaded)
    captured = _captured(loaded)
    assert loaded.past is not None
    names = loaded.past.names()
    if len(caches(captured.graph_module)) != len(names):
        raise NoCacheError(f"{loaded.source} does not append to its cache, or reads it otherwise as well")
    captured.input_names[-len(names):] = names
    return loaded, captured


def _captured(loaded: LoadedModel) -> Captured:
    if loaded.captured is not None:
        return replace(loaded.captured, graph_module=shared_copy(loaded.captured.graph_module))
    model = loaded.module if loaded.module is not None else loaded.exported
    assert model is not None
    try:
        return capture(model, loaded.example_inputs, input_names=loaded.input_names, dynamic_axes=loaded.dynamic_axes,
                       outputs=loaded.outputs, least=None if loaded.past is None else LEAST)
    except ExportError as error:
        raise ExportError(f"{error}{proposal(model)}") from error


def input_specs(captured: Captured, module: nn.Module | None = None) -> list[InputSpec]:
    """Name, shape and dtype of each input of a captured graph, and the limits that `module` sets to token ids."""
    specs = []
    placeholders = (node for node in captured.graph_module.graph.nodes if node.op == "placeholder")
    for node, name in zip(placeholders, captured.input_names):
        value = node.meta["val"]
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        limits = (signature.vocabulary(module), signature.positions(module)) if name == "input_ids" else (None, None)
        specs.append(InputSpec(name, shape, value.dtype, *limits))
    return specs


def _calibration_data(matched: Matched, calibration: Calibration, run: Run) -> CalibrationSet:
    """The data itself; of a part what reaches it when the whole runs on the data: all inputs of the whole, or those
    alone that the part depends on.
    """
    part = matched.loaded.part
    if part is not None and calibration.data is not None:
        text = _tokenization(part.whole, calibration.seq_len, calibration.tokenizer)
        every = _example_specs(part.whole)

        def load(specs: list[InputSpec]) -> CalibrationSet:
            return load_calibration(calibration.data, specs, text=text, seed=calibration.seed,
                                    preprocessing=part.whole.preprocessing, samples=_samples(calibration, text),
                                    batch_size=calibration.batch_size)

        needed = list(range(len(every)))
        try:
            whole = load(every)
        except CalibrationError:
            needed = part.needed()
            if len(needed) in (0, len(every)):
                raise
            whole = load([every[index] for index in needed])
        return replace(whole, batches=[part.inputs(part.completed(batch, needed)) for batch in whole.batches])
    return _own_data(matched, calibration, run)


def _samples(calibration: Calibration, text: Tokenization | None) -> int:
    default = TEXT_SAMPLES if text is not None else IMAGE_SAMPLES
    return default if calibration.samples is None else calibration.samples


def _example_specs(loaded: LoadedModel) -> list[InputSpec]:
    """The inputs of a model that was not captured, as its example inputs show them."""
    names = loaded.input_names or [f"input_{index}" for index in range(len(loaded.example_inputs))]
    free: Sequence[Mapping[int, str]] = loaded.dynamic_axes or [{0: "batch"} for _ in names]
    limits = (signature.vocabulary(loaded.module), signature.positions(loaded.module))
    return [
        InputSpec(name, tuple(None if axis == 0 or axis in axes else size for axis, size in enumerate(tensor.shape)),
                  tensor.dtype, *(limits if name == "input_ids" else (None, None)))
        for name, tensor, axes in zip(names, loaded.example_inputs, free, strict=True)
    ]


def _own_data(matched: Matched, calibration: Calibration, run: Run) -> CalibrationSet:
    loaded, specs = matched.loaded, input_specs(matched.captured, matched.loaded.module)
    whole = loaded.past or loaded.writer
    specs = specs if whole is None else specs[:whole.given]  # the others follow from them
    text = _tokenization(loaded, calibration.seq_len, calibration.tokenizer)
    samples = _samples(calibration, text)
    stored = loaded.example_inputs if loaded.inputs_are_data else None
    none = calibration.data is None and not stored
    cache = Checkpoint()
    if none and run.work_dir is not None:
        settings = [calibration.seed, samples, calibration.batch_size, str(specs), str(loaded.preprocessing),
                    None if text is None else [text.length, text.causal, str(text.frame)]]
        digest = graph_digest(matched.graph_module, "synthesised", *settings).hexdigest()
        cache = open_cache(run.work_dir, digest, World.current() if run.distributed else World())
    model: Callable[..., Any] = matched.graph_module
    if whole is not None:
        model = lambda *batch: matched.graph_module(*whole.complete(batch))  # noqa: E731
    data = load_calibration(calibration.data, specs, preprocessing=loaded.preprocessing, samples=samples,
                            batch_size=calibration.batch_size, seed=calibration.seed, example_inputs=stored, text=text,
                            model=model if none else None, cache=cache)
    if whole is None:
        return data
    with loaded.guard:
        return replace(data, batches=[whole.complete(batch) for batch in data.batches])


def _tokenization(loaded: LoadedModel, seq_len: int | None, tokenizer: Any) -> Tokenization | None:
    """How text becomes the model's inputs; None for a model that takes no token ids."""
    ids = next((t for t in loaded.example_inputs if t.ndim == 2 and t.dtype in (torch.int64, torch.int32)), None)
    if ids is None:
        if seq_len is not None or tokenizer is not None:
            given = "a sequence length" if seq_len is not None else "a tokenizer"
            raise InputError(f"{given} was given, but {loaded.source} takes no token ids")
        return None
    longest = signature.positions(loaded.module)
    if seq_len is not None and not 1 <= seq_len <= (longest or seq_len):
        expected = f"1 to {longest} tokens" if longest else "at least 1 token"
        raise InputError(f"--seq-len {seq_len}: expected {expected}")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(huggingface.find_directory(str(tokenizer)))
    tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
    frame = signature.frame(loaded.module) if tokenizer is None else frame_of(tokenizer)
    length = max(int(t.shape[1]) for t in loaded.example_inputs if t.ndim == 2)  # a mask is of old tokens, too
    return Tokenization(tokenizer, seq_len or length, loaded.task == "causal-lm", frame)
