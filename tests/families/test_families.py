"""Every family the whole way: captured, matched, rewritten, written as ONNX, and run by ONNX Runtime code for code."""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captures import captured, keywords, model
from compiled import PLAIN
from helpers import bypass, calibrate, fused_as_promised, relative
from models import FAMILIES, TEXT_AXES, VOCABULARY, Family, Inputs
from torch import Tensor
from torch.fx import Interpreter, Node

from repquant_fx import CompiledModel, Recipe, compile
from repquant_fx import parity as parity_check
from repquant_fx.frontends.capture import AXES, name_outputs, tensors_in
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.passes.base import run_pass, run_passes, shared_copy
from repquant_fx.passes.fuse_requantization import FuseRequantization
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.install_decision import installed_weights
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.match_sites import MatchSites, Plan
from repquant_fx.passes.normal_form import normalize
from repquant_fx.passes.operators import LOG2_SOFTMAX, NORMS, SOFTMAX
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.pipeline import equalize_layers, quantize_sequentially
from repquant_fx.quantizers.observers import Observer
from repquant_fx.recipe import LayerRule

# one of each peculiarity is compiled in every run of the tests, the others where slow tests are asked for
COMPILED = (
    "deit_distilled",
    "beit",
    "vit_qk_norm",
    "swin",
    "sam_hf",
    "opt_post_norm",
    "qwen2",
    "clip",
    "siglip",
    "bert",
    "swin_features",
)
CASES = [pytest.param(name, id=name, marks=() if name in COMPILED else pytest.mark.slow) for name in FAMILIES]
LANGUAGE = [name for name, family in FAMILIES.items() if family.axes is TEXT_AXES]
CAUSAL = [name for name in LANGUAGE if not name.startswith("bert")]
SIZES = [(1, 3), (3, 5), (3, 11)]  # batch and length, other than those of the capture


def recipe(family: Family) -> Recipe:
    return Recipe(wbits=6, abits=6, layers=tuple(LayerRule(glob, skip=True) for glob in family.float_modules), **PLAIN)


def batches(family: Family) -> list[tuple[Tensor, ...]]:
    """Of different sizes, none that of the example."""
    return [tuple(family.inputs(size, 9, seed).values()) for size, seed in ((4, 1), (3, 2))]


@functools.cache
def compiled(name: str) -> CompiledModel:
    family = FAMILIES[name]
    example, names = family.inputs(2, 7, 0), keywords(family.inputs(2, 7, 0))
    loaded = LoadedModel(
        model(name),
        None,
        tuple(example.values()),
        False,
        None,
        name,
        None if names is None else tuple(names),
        tuple(family.free(list(example))),
        family.outputs,
        float_modules=family.float_modules,
    )
    data = [tuple(tensor[:4] for tensor in family.inputs(4, 9, seed).values()) for seed in (1, 2)]
    return compile(loaded, recipe=recipe(family), calibration=data, batch_size=4)


def eager(name: str, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        result = model(name)(**inputs) if keywords(inputs) else model(name)(*inputs.values())
    return dict(zip(name_outputs(result), tensors_in(result), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_at_every_size(name: str) -> None:
    family, graph = FAMILIES[name], captured(name)
    normal = normalize(shared_copy(graph.graph_module))
    assert graph.eager_difference < 1e-5
    assert graph.input_names == list(family.inputs(2, 7, 0)) and (
        family.outputs is None or tuple(graph.output_names) == family.outputs
    )
    assert [node.meta[AXES] for node in graph.graph_module.graph.find_nodes(op="placeholder")] == family.free(
        graph.input_names
    )
    for size in SIZES:
        inputs = family.inputs(*size, 3)
        expected = eager(name, inputs)
        for result in (graph.graph_module(*inputs.values()), normal(*inputs.values())):
            for label, found in zip(graph.output_names, tensors_in(result), strict=True):
                assert relative(found, expected[label]) < 1e-5, f"{label} at {size}"


def matched(name: str) -> tuple[torch.fx.GraphModule, Plan]:
    graph_module = normalize(shared_copy(captured(name).graph_module))
    return graph_module, run_pass(graph_module, MatchSites(recipe(FAMILIES[name])))


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_softmaxes_are_matched(name: str) -> None:
    """All of them, but for those whose reason is known."""
    expected = FAMILIES[name].left
    graph_module, plan = matched(name)
    used = set()
    for item in plan.left_alone:
        globs = [
            glob for glob, reason in expected.items() if fnmatch.fnmatchcase(item.path, glob) and reason in item.reason
        ]
        assert globs, f"{item.operator} at {item.path}: {item.reason}"
        used.update(globs)
    assert used == set(expected)
    norms, softmaxes = (
        sum(n.target in kind for n in graph_module.graph.nodes if n.op == "call_function") for kind in (NORMS, SOFTMAX)
    )
    assert softmaxes and norms
    rewritten = sum(g.norm is not None for g in plan.groups), sum(g.softmax is not None for g in plan.groups)
    assert sum(rewritten) + len(plan.left_alone) == norms + softmaxes
    assert expected or rewritten == (norms, softmaxes)


@pytest.mark.parametrize("name", FAMILIES)
def test_rewriting_is_an_identity(name: str) -> None:
    """Layers equalized and norms reparameterized, no quantizer: the outputs of before."""
    graph_module, plan = matched(name)
    reference, data, settings = shared_copy(graph_module), batches(FAMILIES[name]), recipe(FAMILIES[name])
    plan = equalize_layers(graph_module, plan, data, settings)
    run_passes(graph_module, [InsertObservers(plan, len(data))])
    observers = [module for module in graph_module.modules() if isinstance(module, Observer)]
    for observer in observers:
        observer.start(len(data))
    with torch.no_grad():
        for batch in data:
            graph_module(*batch)
    for observer in observers:
        observer.recording = False
    calibrate(graph_module, settings, *plan.groups)
    notes = [run_pass(graph_module, ReparameterizeNorms(group)) for group in plan.groups]
    assert any(notes)
    bypass(graph_module, plan)
    inputs = FAMILIES[name].inputs(3, 5, 4).values()
    with torch.no_grad():
        for found, expected in zip(tensors_in(graph_module(*inputs)), tensors_in(reference(*inputs)), strict=True):
            assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_linears_write_the_codes_that_are_promised(name: str) -> None:
    """At every attention's operands, on equal inputs; at few bits, where accumulators are coarse."""
    graph_module, plan = matched(name)
    data, settings = batches(FAMILIES[name]), replace(recipe(FAMILIES[name]), wbits=4, abits=5)
    run_passes(graph_module, [InsertObservers(plan, len(data))])
    quantize_sequentially(graph_module, plan, data, settings)
    weights = installed_weights(graph_module, plan)
    fuse = FuseRequantization(run_pass(graph_module, LowerToQDQ(plan, weights)).quantizers)
    fused = fused_as_promised(graph_module, fuse, *data[0])
    assert fused.codes or fuse.left_alone


@pytest.mark.parametrize("name", CASES)
def test_products_run_as_integer_kernels(name: str) -> None:
    """ONNX Runtime fuses every product but those with a logarithmic operand: a lost fusion makes a file slower than the
    float model.
    """
    kernels = compiled(name).report["kernels"]
    assert sum(kernel["integer"] for kernel in kernels) >= 5
    known = ("logarithmic operand", "a convolution has an integer kernel only where its output is quantized")
    lost = [
        kernel
        for kernel in kernels
        if not kernel["integer"] and not any(reason in kernel["reason"] for reason in known)
    ]
    assert not lost


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_agrees(name: str) -> None:
    """Code for code, also at other sizes than the example's, and the axes and outputs are named."""
    family, result = FAMILIES[name], compiled(name)
    graph = captured(name)
    assert result.parity is not None and not result.parity.problems()
    dims = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in result.proto.graph.input
    ]
    for label, sizes, example in zip(graph.input_names, dims, family.inputs(2, 7, 0).values(), strict=True):
        names = family.free([label])[0]
        assert sizes == [names.get(axis, size) for axis, size in enumerate(example.shape)]
    assert [value.name for value in result.proto.graph.output] == graph.output_names
    for size in SIZES[::2]:
        inputs = list(family.inputs(*size, 5).values())
        other = parity_check.compare(result.graph_module, result.proto, result.quantizers, inputs, graph.input_names)
        assert not other.problems(), size


def values(result: CompiledModel, target: object, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """(first operand, result) of every `target` in the lowered graph."""
    found = []

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.target is target:
                found.append((self.env[n.args[0]], value))
            return value

    with torch.no_grad():
        Watch(result.graph_module).run(*inputs.values())
    return found


def run(result: CompiledModel, inputs: Inputs) -> np.ndarray:
    return np.asarray(result.session().run(None, {key: value.numpy() for key, value in inputs.items()})[0])


def padded(left: bool) -> Callable[[Inputs], tuple[Inputs, Inputs, np.ndarray]]:
    """The same text with other ids under the padding of its first half of rows, and where the real tokens are."""
    def change(inputs: Inputs) -> tuple[Inputs, Inputs, np.ndarray]:
        mask = inputs["attention_mask"].clone()
        mask[:2, slice(0, 4) if left else slice(-4, None)] = 0
        other = torch.where(mask.bool(), inputs["input_ids"], VOCABULARY - 1 - inputs["input_ids"])
        return {**inputs, "attention_mask": mask}, {"input_ids": other, "attention_mask": mask}, mask.bool().numpy()
    return change


def later(inputs: Inputs) -> tuple[Inputs, Inputs, np.ndarray]:
    """The same text with other tokens at its end, and where it is the same."""
    other, same = copy.deepcopy(inputs), torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    other["input_ids"][:, -3:] = VOCABULARY - 1 - other["input_ids"][:, -3:]
    same[:, -3:] = False
    return inputs, other, same.numpy()


HIDDEN = [
    pytest.param(name, change, id=f"{name}-{label}", marks=() if name in COMPILED else pytest.mark.slow)
    for name in LANGUAGE
    for label, change in (("left", padded(True)), ("right", padded(False)), ("causal", later))
    if label != "causal" or name in CAUSAL
]


@pytest.mark.parametrize("name, change", HIDDEN)
def test_what_is_masked_is_hidden(name: str, change: Callable[[Inputs], tuple[Inputs, Inputs, np.ndarray]]) -> None:
    """Its probabilities are exactly 0, and real tokens give the same whatever it says."""
    result = compiled(name)
    one, two, seen = change(FAMILIES[name].inputs(4, 9, 6))
    softmaxes = values(result, LOG2_SOFTMAX, one)
    assert softmaxes
    for logits, probabilities in softmaxes:
        hidden = (logits < -1e30) & (logits > -1e30).any(-1, keepdim=True)  # in a row that sees something
        assert (
            bool(hidden.any()) and bool((probabilities[hidden] == 0).all()) and bool((probabilities[~hidden] > 0).any())
        )
    first, second = run(result, one), run(result, two)
    assert not np.array_equal(first, second)  # the change is one
    np.testing.assert_array_equal(first[seen], second[seen])
