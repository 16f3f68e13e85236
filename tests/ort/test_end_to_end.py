"""The exported file under ONNX Runtime: it computes what the FX reference computes, code for code, and looks as promised."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from helpers import swin, vit
from onnx import TensorProto, numpy_helper

from repquant_fx import CompiledModel, InputError, ParityError, Recipe, compile
from repquant_fx.parity import compare
from repquant_fx.passes.base import attribute
from repquant_fx.passes.lower_to_qdq import QUANTIZE

SHAPE = (3, 16, 16)


def data(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@cache
def compiled(wbits: int = 4, abits: int = 4, model: str = "vit") -> CompiledModel:
    module = {"vit": vit, "swin": swin}[model]()
    return compile(module, recipe=Recipe(wbits=wbits, abits=abits), calibration=data(), samples=40, example_inputs=(data(2),))


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in proto.graph.initializer}


@pytest.mark.parametrize("bits", [(b, b) for b in range(2, 9)] + [(2, 7), (7, 3)])
def test_codes_equal_at_every_bit_width(bits: tuple[int, int]) -> None:
    result = compiled(*bits)
    assert result.parity is not None and not result.parity.problems()
    assert result.parity.share < 0.01 and result.parity.output_step < 1e-4
    codes = [n for n in result.graph_module.graph.nodes if n.target is QUANTIZE]
    assert {n.args[3] for n in codes} <= {bits[1], 8} and len(codes) + 2 == len(result.quantizers)  # two softmaxes


def test_swin_agrees_too() -> None:
    parity = compiled(4, 4, "swin").parity
    assert parity is not None and not parity.problems() and parity.share < 0.01


def test_any_batch_runs_and_equals_the_reference() -> None:
    result = compiled()
    runner = result.session(1)
    for count in (1, 3, 8):
        x = data(count, seed=5)
        found = torch.from_numpy(runner.run(None, {"x": x.numpy()})[0])
        with torch.no_grad():
            expected = result.graph_module(x)
        assert found.shape == (count, 5) and float((found - expected).abs().max() / expected.abs().max()) < 0.2


@pytest.mark.parametrize("wbits", [3, 4, 6])
def test_weights_are_stored_as_promised(wbits: int) -> None:
    proto = compiled(wbits, 6).proto
    onnx.checker.check_model(proto, full_check=True)
    tensors = initializers(proto)
    weights = {n: t for n, t in tensors.items() if n.endswith("weight_quantized") or n.endswith("patches_quantized")}
    assert len(weights) == 10
    for name, tensor in weights.items():
        assert tensor.data_type == (TensorProto.INT4 if wbits <= 4 else TensorProto.INT8)
        assert len(tensor.raw_data) == (-(-int(np.prod(tensor.dims)) // 2) if wbits <= 4 else int(np.prod(tensor.dims)))
        scale = tensors[name.replace("_quantized", "_scale")]
        assert list(scale.dims) == [tensor.dims[0]]  # one a channel of the output
    bias, scale = tensors["blocks.0.attn.qkv.bias_quantized"], tensors["blocks.0.attn.qkv.bias_scale"]
    assert bias.data_type == TensorProto.INT32
    product = numpy_helper.to_array(tensors["blocks.0.attn.qkv.input_scale"]) * numpy_helper.to_array(tensors["blocks.0.attn.qkv.weight_scale"])
    np.testing.assert_array_equal(numpy_helper.to_array(scale), product)


def test_activations_have_one_scale_a_tensor_and_stand_on_operands() -> None:
    proto = compiled().proto
    tensors, readers = initializers(proto), {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    quantizers = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == 16
    for node in quantizers:
        assert list(tensors[node.input[1]].dims) == [] and tensors[node.input[2]].data_type == TensorProto.UINT8
        value = node.output[0]
        while readers[value][0].op_type in ("Min", "DequantizeLinear"):
            value = readers[value][0].output[0]
        assert {r.op_type for r in readers[value]} <= {"Gemm", "MatMul"}
    assert [n.op_type for n in proto.graph.node].count("Gemm") == 10
    assert [f.name for f in proto.functions] == ["Log2Softmax"]


def test_names_are_module_paths() -> None:
    names = {n.name for n in compiled().proto.graph.node}
    assert {"blocks.0.norm1/LayerNormalization", "blocks.1.mlp.fc2/Gemm", "blocks.0.attn/Log2Softmax", "head/Gemm"} <= names
    assert len(names) == len(compiled().proto.graph.node)
    assert not any(name.startswith(("node_", "val_")) for name in names | set(initializers(compiled().proto)))


def test_metadata_tells_method_bits_and_version() -> None:
    found = {p.key: p.value for p in compiled(3, 6).proto.metadata_props}
    assert found["repquant_fx.bits"] == "W3A6" and found["repquant_fx.version"] and "RepQuant" in found["repquant_fx.method"]
    assert Recipe.from_dict(json.loads(found["repquant_fx.recipe"])) == Recipe(wbits=3, abits=6)
    assert json.loads(found["repquant_fx.preprocessing"])["input_size"][0] == 3
    text = compiled(3, 6).to_bytes()
    assert b"site-packages" not in text and b".py" not in text


def test_same_inputs_same_bytes() -> None:
    again = compile(vit(), recipe=Recipe(wbits=4, abits=4), calibration=data(), samples=40, example_inputs=(data(2),))
    assert again.to_bytes() == compiled().to_bytes()


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.input_scale", "blocks.1.attn.probabilities_scale", "head.bias_quantized"])
def test_a_tampered_file_is_caught(name: str) -> None:
    result = compiled(6, 6)
    proto = onnx.ModelProto()
    proto.CopyFrom(result.proto)
    tensor = initializers(proto)[name]
    value = numpy_helper.to_array(tensor)
    changed = value + 200 if value.dtype == np.int32 else value * np.float32(1.1)
    tensor.CopyFrom(numpy_helper.from_array(changed.astype(value.dtype), name))
    parity = compare(result.graph_module, proto, result.quantizers, [data(4, seed=2)], ["x"])
    assert parity.problems()
    with pytest.raises(ParityError, match="disagree beyond float rounding"):
        parity.raise_on_problems()


def test_the_report_covers_every_layer() -> None:
    report = json.loads(compiled().report_json())
    paths = [entry["path"] for entry in report["layers"]]
    assert len(paths) == 14 and paths[0] == "patch_embed.proj" and paths[-1] == "head"
    for entry in report["layers"]:
        assert entry["sqnr_db"] > 0 and entry["inputs"]
        for item in entry["inputs"]:
            assert item["scale"] > 0 and item["bits"] == (8 if entry["path"] == "patch_embed.proj" else 4)
    qkv = next(e for e in report["layers"] if e["path"] == "blocks.0.attn.qkv")
    assert "channel scales spanned" in qkv["rewritten"][0] and qkv["weight"]["bits"] == 4
    assert qkv["weight"]["output_error"]["chosen"] <= qkv["weight"]["output_error"]["round_to_nearest"]
    assert report["parity"]["agrees"] is True and report["left_alone"] == []
    assert report["capture"]["dynamic_batch"] is True and report["calibration"]["held_back"] == 10


def test_an_exported_program_compiles_alike() -> None:
    program = torch.export.export(vit(), (data(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    result = compile(program, recipe=Recipe(wbits=4, abits=4), calibration=data(), samples=40)
    reference = compiled()
    x = data(16, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(x), reference.graph_module(x), rtol=1e-3, atol=1e-3)


def test_every_reduced_method_exports_and_agrees() -> None:
    for change in ({"norm": "channelwise"}, {"norm": "layerwise"}, {"softmax": "log2"}, {"softmax": "uniform"}, {"gptq": False},
                   {"correction": False, "clipping": "adam", "softmax": "log_sqrt2"}):
        result = compile(vit(depth=1), recipe=Recipe(wbits=4, abits=6, **change), calibration=data(), samples=40, example_inputs=(data(2),))
        assert result.parity is not None and not result.parity.problems(), change


def test_the_callers_model_is_not_touched() -> None:
    module = vit(depth=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    compile(module, recipe=Recipe(wbits=4, abits=4), calibration=data(), samples=40, example_inputs=(data(2),))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to quantize"):
        compile(torch.nn.Sequential(torch.nn.ReLU()), example_inputs=(torch.randn(2, 4),))


def test_lowered_weights_are_the_codes() -> None:
    graph_module = compiled().graph_module
    codes = [n for n in graph_module.graph.nodes if n.op == "get_attr" and str(n.target).endswith("weight_quantized")]
    assert codes and all(attribute(graph_module, n).dtype is torch.int8 for n in codes)
    assert all(int(attribute(graph_module, n).abs().max()) <= 8 for n in codes)
