"""Does a runtime compute what a file says? For files made before, of which nothing but the file is at hand.

The file is compared with itself: in the runtime as that runs it, and in ONNX Runtime without optimizations, operator by
operator with Q/DQ in float. Both are judged as `parity` judges: *step by step*, the second is given the codes of the
first at every quantizer, so that codes may differ by at most one, rarely, and the output by float rounding only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.synthetic import Synthesis, synthesise
from repquant_fx.checkpoint import Checkpoint
from repquant_fx.errors import InputError, ModelFileError, RepQuantError, RepQuantWarning, first_line
from repquant_fx.evaluation.decoder import half_way
from repquant_fx.evaluation.runners import proto_runner
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.conformance import check_conformance
from repquant_fx.exporters.inlining import inlined
from repquant_fx.exporters.reading import OnnxFile, read_onnx
from repquant_fx.fit import misfit
from repquant_fx.frontends.past import is_cache
from repquant_fx.naming import UINT8
from repquant_fx.parity import CodeDifference, Parity, largest_difference, share_of, sqnr, ties
from repquant_fx.runtimes import Call, load_as_written, loader, version
from repquant_fx.security.guard import guarded
from repquant_fx.targets import DEFAULT, RUNTIMES, TARGETS

SAMPLES = 4
REFERENCE = "the file run operator by operator"
_TYPES = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.DOUBLE: torch.float64,
          TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool,
          TensorProto.UINT8: torch.uint8}
_TOKENS = ("input_ids",)  # what all else that a decoder takes follows from
_OWN, _GIVEN, _EXACT = ":own", ":given", ":exact"


@dataclass(frozen=True)
class FileCheck:
    """What was found.

    Attributes:
        target: that the file says it is for.
        version: of the runtime.
        inputs: what the file was run on, in words.
    """

    target: str
    version: str | None
    inputs: str
    parity: Parity


@dataclass(frozen=True)
class _Site:
    """A quantizer of a file: `value` are its codes, or the values of a logarithmic one; `node` is its QuantizeLinear,
    whose input lies `step` apart from code to code."""

    value: str
    node: onnx.NodeProto
    step: np.ndarray
    zero_point: int | None = None  # of logarithms
    narrow: bool = False  # UINT4, which no session gives out


def check_file(path: str | Path, runtime: str | None = None, data: Any = None, *, samples: int = SAMPLES,
               seed: int = 0) -> FileCheck:
    """Run a file in a runtime and compare.

    Args:
        path: an ONNX file with Q/DQ.
        runtime: one of `targets.RUNTIMES`; that of the file's target where None.
        data: what `load_calibration` takes; made up from the file's inputs where None.

    Raises:
        InputError: the file or the data cannot be used, or the runtime does not take the file.
    """
    file = read_onnx(path)
    target = file.metadata.target()
    runtime = runtime or TARGETS.get(target, TARGETS[DEFAULT]).runtime
    load = loader(runtime)  # imported before the guard
    row = next(each for each in TARGETS.values() if each.runtime == runtime)
    if sentence := misfit(file.apart):
        warnings.warn(f"{path}: {sentence}", RepQuantWarning, stacklevel=2)
    try:
        with guarded(f"running {path}"):
            check_conformance(file.model, row)
            specs, plain = input_specs(file.model), OnnxModel(inlined(file.model), file.files)
            sites = find_sites(plain.proto)
        given = [s for s in specs if s.name in _TOKENS] if any(is_cache(s.name) for s in specs) else specs
        inputs, about = _inputs(file, given, data, samples, seed)
        with guarded(f"running {path}"):
            feed = {spec.name: tensor for spec, tensor in zip(given, inputs)}
            if given is not specs:  # the caches are those that the file itself makes
                ids = feed["input_ids"]
                feed = half_way(proto_runner(file.apart, str(path)), ids, torch.ones_like(ids))
            parity = _compare(file.apart, plain, sites, feed, load, RUNTIMES[runtime])
    except RepQuantError:
        raise
    except Exception as error:
        raise InputError(f"{path} fails under {RUNTIMES[runtime]}: {first_line(error)}") from error
    return FileCheck(target, version(runtime), about, parity)


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The inputs of a file.

    Raises:
        ModelFileError: one of a type that no tensor of ours has.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    specs = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        if kind.elem_type not in _TYPES:
            raise ModelFileError(f"the input {value.name!r} is of a type that check cannot feed")
        shape = tuple(int(dim.dim_value) or None for dim in kind.shape.dim)
        rows = [constants[node.input[0]].dims[0] for node in model.graph.node
                if node.op_type == "Gather" and value.name in node.input[1:] and node.input[0] in constants]
        specs.append(InputSpec(value.name, shape, _TYPES[kind.elem_type], min(rows, default=None)))
    return specs


def find_sites(model: onnx.ModelProto) -> list[_Site]:
    """The quantizers of a graph without functions whose scale is constant."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def only_reader(name: str, operator: str) -> str | None:
        found = readers.get(name, [])
        return found[0].output[0] if len(found) == 1 and found[0].op_type == operator else None

    sites = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.domain or node.input[1] not in constants:
            continue
        codes = only_reader(node.output[0], "Min") or node.output[0]
        step = numpy_helper.to_array(constants[node.input[1]])
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        level = only_reader(codes, "DequantizeLinear")
        exponential = only_reader(level, "Exp") if level else None
        value = only_reader(exponential, "ThresholdedRelu") if exponential else None
        if value is not None and zero is not None and step.ndim == 0:
            sites.append(_Site(value, node, step, int(numpy_helper.to_array(zero))))
        else:
            sites.append(_Site(codes, node, step, narrow=zero is not None and zero.data_type == TensorProto.UINT4))
    return sites


def _inputs(file: OnnxFile, specs: Sequence[InputSpec], data: Any, samples: int, seed: int
            ) -> tuple[list[Tensor], str]:
    preprocessing = file.metadata.preprocessing()
    if data is not None:
        found = load_calibration(data, specs, preprocessing=preprocessing, samples=samples, batch_size=samples,
                                 seed=seed)
        return list(found.batches[0]), f"{len(found.batches[0][0])} samples of {found.origin}"
    fixed = next((spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None), None)
    made = synthesise(Synthesis(specs, None, preprocessing, None, fixed or samples, fixed is not None, seed),
                      fixed or samples, Checkpoint())
    return [column[:fixed or samples] for column in made.columns], made.origin


def _compare(model: OnnxModel, plain: OnnxModel, sites: Sequence[_Site], feed: Mapping[str, Tensor],
             load: Any, title: str) -> Parity:
    outputs = len(model.proto.graph.output)
    found = load(model)(feed)
    expected = load_as_written(plain)(feed)
    exposed = load(_exposed(model, sites))(feed)
    given = dict(zip((site.value for site in sites), exposed[outputs:]))
    free = dict(zip((site.value for site in sites), load_as_written(_exposed(plain, sites))(feed)[outputs:]))
    step = _stepwise(plain, sites, given, feed)
    differences = {}
    for index, site in enumerate(sites):
        theirs, own = _codes(site, given[site.value]), _codes(site, step[outputs + 2 * index])
        apart, tied = (own - theirs).abs(), _ties(site, step[outputs + 2 * index + 1])
        differences[site.value] = CodeDifference(
            share=share_of(_codes(site, free[site.value]) != theirs), share_step=share_of((apart > 0) & ~tied),
            largest_step=int(apart.max()) if apart.numel() else 0)
    judged = zip(exposed[:outputs], step[:outputs])
    return Parity(len(next(iter(feed.values()))), min(sqnr(a, b) for a, b in zip(found, expected)),
                  max((largest_difference(a, b) for a, b in judged if b.is_floating_point()), default=0.0),
                  differences, title, REFERENCE)


def _exposed(model: OnnxModel, sites: Sequence[_Site]) -> OnnxModel:
    """A copy that gives the codes of its quantizers, too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    for site in sites:
        name = site.value
        if site.narrow:
            copy.graph.node.append(helper.make_node("Cast", [name], [UINT8.of(name)], to=TensorProto.UINT8))
            name = UINT8.of(name)
        copy.graph.output.append(_typed(name, TensorProto.UNDEFINED))
    return replace(model, proto=copy)


def _stepwise(plain: OnnxModel, sites: Sequence[_Site], given: Mapping[str, Tensor], feed: Mapping[str, Tensor]
              ) -> list[Tensor]:
    """The outputs on given codes; then of each site its own codes, and what it quantized."""
    copy = onnx.ModelProto()
    copy.CopyFrom(plain.proto)
    cut = {site.value: site for site in sites}
    for node in copy.graph.node:
        for index, name in enumerate(node.output):
            if name in cut:
                node.output[index] = name + _OWN
    ahead = []
    for site in sites:
        own, value = site.value + _OWN, site.value
        if site.narrow:
            copy.graph.node.append(helper.make_node("Cast", [own], [UINT8.of(own)], to=TensorProto.UINT8))
            ahead.append(helper.make_node("Cast", [value + _GIVEN], [value], to=TensorProto.UINT4))
            own, value = UINT8.of(own), value + _GIVEN
        kind = helper.np_dtype_to_tensor_dtype(given[site.value].numpy().dtype)
        copy.graph.input.append(_typed(value, kind))
        exact = own + _EXACT
        copy.graph.node.append(helper.make_node("Identity", [site.node.input[0]], [exact]))
        copy.graph.output.extend([_typed(own, TensorProto.UNDEFINED), _typed(exact, TensorProto.UNDEFINED)])
    nodes = [*ahead, *copy.graph.node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    codes = {site.value + (_GIVEN if site.narrow else ""): given[site.value] for site in sites}
    call: Call = load_as_written(replace(plain, proto=copy))
    return call({**feed, **codes})


def _typed(name: str, kind: int) -> onnx.ValueInfoProto:
    """A value without a shape; without a type, too, where the runtime infers it."""
    return helper.make_tensor_value_info(name, kind, None) if kind else onnx.ValueInfoProto(name=name)


def _codes(site: _Site, values: Tensor) -> Tensor:
    """Integer codes (int32); those of logarithmic values are computed from them, 0 for exact zero."""
    if site.zero_point is None:
        return values.to(torch.int32)
    decoded = torch.round(values.double().log() / float(site.step)) + site.zero_point
    return torch.where(values > 0, decoded, 0).to(torch.int32)


def _ties(site: _Site, exact: Tensor) -> Tensor:
    """Where what was quantized lies midway between two codes."""
    axis = next((a.i for a in site.node.attribute if a.name == "axis"), 1)
    return ties(exact, torch.from_numpy(np.array(site.step, np.float64)), axis)
