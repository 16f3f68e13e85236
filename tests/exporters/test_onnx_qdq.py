"""Writing a lowered graph: what the file holds, and clear errors for what ONNX cannot say."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import onnx
import pytest
import torch
from helpers import Encoder, canonical, output, quantized, redraw, sequences
from onnx import TensorProto
from torch import Tensor
from torch.fx import GraphModule

from repquant_fx.exporters import onnx_qdq
from repquant_fx.exporters.dynamic_shapes import dynamic_shapes
from repquant_fx.exporters.metadata import describe
from repquant_fx.exporters.onnx_qdq import ExportError, export_onnx, narrow_weights
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.recipe import LayerRule, Recipe
from repquant_fx.runtime import session

PLAIN = {"correction": False, "gptq": False, "clipping": "none", "activations": "minmax", "weights": "minmax"}


def lowered(recipe: Recipe, **options: object) -> GraphModule:
    run = quantized(canonical(redraw(Encoder(**options)), sequences()), recipe, [sequences(16)])
    return run_passes(run.graph_module, [LowerToQDQ(run.plan, run.weights)])


@pytest.fixture(scope="module")
def encoder() -> GraphModule:
    """4-bit weights but for the embedding's 6."""
    return lowered(Recipe(wbits=4, abits=5, layers=(LayerRule("embed", wbits=6),), **PLAIN))


def export(
    graph_module: GraphModule, metadata: dict[str, str] | None = None, inputs: Tensor | None = None
) -> onnx.ModelProto:
    return export_onnx(
        copy.deepcopy(graph_module),
        [sequences(2) if inputs is None else inputs],
        input_names=["tokens"],
        output_names=["scores"],
        dynamic_shapes=dynamic_shapes(graph_module),
        metadata=metadata,
    ).inlined()


def test_the_file_computes_what_the_graph_computes(encoder: GraphModule) -> None:
    proto = export(encoder)
    runner = session(proto, threads=1)
    for count in (1, 2, 7):
        x = sequences(count, seed=3)
        found = runner.run(["scores"], {"tokens": x.numpy()})[0]
        assert found.shape == (count, 4)
        assert np.abs(found - output(encoder, x).numpy()).max() <= 0.05 * np.abs(found).max()


def test_header(encoder: GraphModule) -> None:
    proto = export(encoder, {"b": "2", "a": "1"})
    assert proto.producer_name == "repquant-fx" and proto.graph.name == "main"
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 21), ("repquant_fx", 1)}
    assert [(e.key, e.value) for e in proto.metadata_props] == [("a", "1"), ("b", "2")]
    assert [i.name for i in proto.graph.input] == ["tokens"] and [o.name for o in proto.graph.output] == ["scores"]
    batch, *rest = proto.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [d.dim_value for d in rest] == [6, 8]
    assert [f.name for f in proto.functions] == ["Log2Softmax"] and proto.functions[0].domain == "repquant_fx"


def test_the_same_graph_gives_the_same_bytes(encoder: GraphModule) -> None:
    first, second = (export(encoder, {"k": "v"}).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_no_notes_of_the_exporter_are_left(encoder: GraphModule) -> None:
    proto = export(encoder)
    assert not proto.doc_string and not proto.graph.doc_string and not proto.graph.metadata_props
    for node in proto.graph.node:
        assert not node.doc_string and not node.metadata_props
    for tensor in proto.graph.initializer:
        assert not tensor.doc_string
    data = proto.SerializeToString()
    assert b"pkg.torch" not in data and b".py" not in data


def test_functions_only_where_they_are_used() -> None:
    proto = export(lowered(Recipe(wbits=8, abits=8, softmax="uniform", **PLAIN)))
    assert not proto.functions and [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert "Softmax" in [n.op_type for n in proto.graph.node]


def test_mixed_weight_bits(encoder: GraphModule) -> None:
    """Each layer in its own container."""
    names = narrow_weights(encoder)
    assert "embed.weight_quantized" not in names and "head.weight_quantized" in names and len(names) == 7
    assert not any("bias" in name for name in names)
    kinds = {t.name: t.data_type for t in export(encoder).graph.initializer}
    assert kinds["embed.weight_quantized"] == TensorProto.INT8 and kinds["head.weight_quantized"] == TensorProto.INT4
    assert kinds["head.bias_quantized"] == TensorProto.INT32


def test_layers_without_bias() -> None:
    proto = export(lowered(Recipe(wbits=4, abits=8, **PLAIN), bias=False))
    gemms = {n.name: n for n in proto.graph.node if n.op_type == "Gemm"}
    assert len(gemms) == 8
    assert len(gemms["blocks.0.fc2/Gemm"].input) == 2  # nothing is added that need not be
    assert len(gemms["blocks.0.fc1/Gemm"].input) == 3  # gained one from the norm's shift


@torch.library.custom_op("repquant_fx_tests::unwritable", mutates_args=())
def unwritable(x: Tensor) -> Tensor:
    return x.clone()


@unwritable.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_counterpart_is_named(encoder: GraphModule) -> None:
    graph_module = copy.deepcopy(encoder)
    last = next(n for n in reversed(graph_module.graph.nodes) if n.op == "call_function")
    with graph_module.graph.inserting_after(last):
        added = graph_module.graph.call_function(torch.ops.repquant_fx_tests.unwritable.default, (last,))
    last.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    graph_module.recompile()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with pytest.raises(ExportError, match="unwritable"):
        export(graph_module)
    assert logger.level == level


def test_a_refused_model_is_an_error(encoder: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is taken twice is what the checker finds."""
    def spoil(model: object, *names: set[str]) -> int:
        for node in model.graph:  # type: ignore[attr-defined]
            node.outputs[0].name = "same"
        return 0

    monkeypatch.setattr(onnx_qdq, "pack_weights", spoil)
    with pytest.raises(ExportError, match=r"onnx\.checker refuses"):
        export(encoder)


def test_metadata_keys() -> None:
    recipe = Recipe(wbits=4, abits=6, gptq=False, clipping="none", layers=(LayerRule("head", wbits=8),))
    entries = describe(recipe, {"input_size": (3, 8, 8), "mean": [0.5]})
    assert entries["repquant_fx.bits"] == "W4A6 with per-layer overrides"
    assert "2402.05628" in entries["repquant_fx.method"] and "round to nearest" in entries["repquant_fx.method"]
    assert "no clipping" in entries["repquant_fx.method"]
    assert Recipe.from_dict(json.loads(entries["repquant_fx.recipe"])) == recipe
    assert json.loads(entries["repquant_fx.preprocessing"]) == {"input_size": [3, 8, 8], "mean": [0.5]}
    plain = describe(Recipe(), None)
    assert set(entries) - set(plain) == {"repquant_fx.preprocessing"}
    assert plain["repquant_fx.bits"] == "W8A8" and "GPTQ" in plain["repquant_fx.method"]
