"""The written file against the FX reference, code for code, and what the file is made of.

Long because all of it looks at the same compiled models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import compiled, inputs
from helpers import values_at
from onnx import TensorProto, numpy_helper
from torch import Tensor

import repquant_fx
from repquant_fx import CompiledModel, ParityError, Recipe
from repquant_fx.parity import Parity, compare, signal_and_noise, sqnr
from repquant_fx.passes.operators import LOG2_SOFTMAX
from repquant_fx.runtime import session

BITS = range(2, 9)
MODELS = ("vit", "small_swin")
PRODUCTS = {"MatMul", "Gemm", "Conv"}
LAYOUT = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Gather"}


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in proto.graph.initializer}


def array(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


def run_with(proto: onnx.ModelProto, names: dict[str, int], x: Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The first output, and the values `names` (name to element type)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name, kind in names.items():
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    found = session(copy, threads=1).run(None, {"x": x.numpy()})
    return found[0], dict(zip(names, found[-len(names):]))


@pytest.fixture(scope="module", params=[(m, b) for m in MODELS for b in BITS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int, CompiledModel]:
    name, bits = request.param
    return name, bits, compiled(name, bits)


def end_to_end(result: CompiledModel, x: Tensor) -> None:
    """Without the product's own comparison: its codes in ONNX Runtime and in FX, each running the whole model by
    itself.
    """
    sites = {name.replace("/", "."): node for name, node in result.quantizers.items()}
    uniform = {f"{n}_quantized": node for n, node in sites.items() if node.target is not LOG2_SOFTMAX}
    logarithmic = {f"{n}_dequantized": node for n, node in sites.items() if node.target is LOG2_SOFTMAX}
    output, values = run_with(
        result.proto, {**dict.fromkeys(uniform, TensorProto.UINT8), **dict.fromkeys(logarithmic, TensorProto.FLOAT)}, x
    )
    nodes = list({**uniform, **logarithmic}.values())
    expected = dict(zip([*uniform, *logarithmic], values_at(result.graph_module, nodes, x)))
    bits = {
        site["name"].replace("/", "."): site["bits"] for layer in result.report["layers"] for site in layer["inputs"]
    }
    assert sorted(bits) == sorted(sites)
    flipped = 0.0
    for name in uniform:
        codes = expected[name].numpy()
        assert codes.dtype == values[name].dtype == np.uint8 and codes.shape == values[name].shape
        assert values[name].max() <= 2 ** bits[name.removesuffix("_quantized")] - 1
        assert len(np.unique(codes)) > 1
        apart = np.abs(codes.astype(int) - values[name].astype(int))
        # a flip on a rounding boundary moves the whole token in what follows
        assert (apart > 0).mean() <= (0.2 if flipped else 0.02) and apart.max(initial=0) <= (8 if flipped else 1), name
        flipped += (apart > 0).sum()
    for name in logarithmic:
        theirs, ours = values[name], expected[name].numpy()
        assert len(np.unique(theirs)) <= 2 ** bits[name.removesuffix("_dequantized")]
        assert np.array_equal(theirs == 0, ours == 0)
        assert np.isclose(theirs, ours, rtol=1e-5, atol=0).mean() >= (0.95 if flipped else 0.995), name
    reference = result.graph_module(x).numpy()
    assert output.shape == reference.shape and np.isfinite(output).all()
    assert np.abs(output - reference).max() <= 0.05 * np.abs(reference).max()


def test_codes_equal_end_to_end(case: tuple[str, int, CompiledModel]) -> None:
    name, _, result = case
    end_to_end(result, inputs(name, 5, seed=99))


@pytest.mark.parametrize("name, bits", [("vit", 4), ("swin", 4)])
def test_codes_equal_end_to_end_with_the_whole_method(name: str, bits: int) -> None:
    result = compiled(name, bits, method="repquant")
    end_to_end(result, inputs(name, 5, seed=98))
    assert result.parity is not None and not result.parity.problems()


@pytest.mark.parametrize(
    "changes", [{"softmax": "uniform", "equalize": ()}, {"softmax": "log2"}, {"norm": "channelwise"}], ids=str
)
def test_codes_equal_with_other_quantizers(changes: dict[str, Any]) -> None:
    end_to_end(compiled("vit", 4, **changes), inputs("vit", 5, seed=97))


def test_the_check_agrees(case: tuple[str, int, CompiledModel]) -> None:
    _, _, result = case
    parity = result.parity
    assert parity is not None and parity.problems() == [] and set(parity.quantizers) == set(result.quantizers)
    assert result.report["parity"]["agrees"] is True and parity.samples == result.report["calibration"]["held_back"]


def test_the_checker_accepts(case: tuple[str, int, CompiledModel]) -> None:
    _, _, result = case
    onnx.checker.check_model(onnx.load_from_string(result.to_bytes()), full_check=True)
    assert {(o.domain, o.version) for o in result.proto.opset_import} == {("", 21), ("repquant_fx", 1)}
    assert {n.domain for n in result.proto.graph.node} == {"", "repquant_fx"}
    assert [f.name for f in result.proto.functions] == ["Log2Softmax"]


def test_activations_have_one_scale(case: tuple[str, int, CompiledModel]) -> None:
    """Where codes are made (scale 1 where a Linear writes them itself) and where they are read."""
    _, bits, result = case
    tensors, seen = initializers(result.proto), set()
    for node in result.proto.graph.node:
        if (
            node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            or tensors[node.input[1]].dims
            or "_int8" in node.input[0]
        ):
            continue
        scale, zero = tensors[node.input[1]], tensors[node.input[2]]
        assert list(scale.dims) == [] and list(zero.dims) == [] and float(array(scale)) > 0
        assert scale.data_type == TensorProto.FLOAT and zero.data_type == TensorProto.UINT8
        assert 0 <= int(array(zero)) <= 255
        if not node.input[1].startswith("patch_embed"):
            assert int(array(zero)) <= 2**bits - 1
        if node.op_type == "DequantizeLinear":
            seen.add(node.input[0])
        elif node.input[1].endswith("output_scale"):
            assert float(array(scale)) == 1  # the Linear's own integers; the zero point is the first operand's
    assert len(seen) == sum(n.target is not LOG2_SOFTMAX for n in result.quantizers.values()) > 5


def test_codes_saturate_below_eight_bits(case: tuple[str, int, CompiledModel]) -> None:
    """The input of the patch embedding has 8 bits; every other quantizer a Min with 2^b - 1 right behind it."""
    _, bits, result = case
    tensors, readers = initializers(result.proto), consumers(result.proto)
    for node in result.proto.graph.node:
        if node.op_type == "QuantizeLinear":
            following = [n.op_type for n in readers[node.output[0]]]
            if bits == 8 or node.input[1].startswith("patch_embed"):
                assert set(following) <= {"DequantizeLinear", *LAYOUT}
            else:
                assert following == ["Min"]
                top = tensors[readers[node.output[0]][0].input[1]]
                assert int(array(top)) == 2**bits - 1 and top.data_type == TensorProto.UINT8


def consumers(proto: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def test_quantizers_stand_in_front_of_products_only(case: tuple[str, int, CompiledModel]) -> None:
    _, _, result = case
    readers = consumers(result.proto)
    for node in result.proto.graph.node:
        if node.op_type == "QuantizeLinear":
            chain = readers[node.output[0]]
            while any(n.op_type in LAYOUT | {"Min"} for n in chain):  # codes are moved about, values are not
                chain = [r for n in chain for r in (readers[n.output[0]] if n.op_type in LAYOUT | {"Min"} else [n])]
            assert {n.op_type for n in chain} == {"DequantizeLinear"}
            for dequantize in chain:
                assert {n.op_type for n in readers[dequantize.output[0]]} <= PRODUCTS, node.name
        if node.op_type == "Log2Softmax":
            assert {n.op_type for n in readers[node.output[0]]} == {"MatMul"}


def test_every_product_reads_quantized_operands(case: tuple[str, int, CompiledModel]) -> None:
    _, _, result = case
    producer = {name: node for node in result.proto.graph.node for name in node.output}
    products = [n for n in result.proto.graph.node if n.op_type in PRODUCTS]
    assert len(products) == len(result.report["layers"])
    for node in products:
        assert all(producer[name].op_type in ("DequantizeLinear", "Log2Softmax") for name in node.input), node.name
    # each weighted layer is a Gemm, each product of activations a MatMul
    assert sum(n.op_type == "Gemm" for n in products) == sum("weight" in e for e in result.report["layers"])


def test_weights_and_biases(case: tuple[str, int, CompiledModel]) -> None:
    """Per-channel scales; up to 4 bits INT4 in raw data behind a Cast, above INT8; int32 biases at s_x * s_w."""
    _, bits, result = case
    tensors = initializers(result.proto)
    producer = {name: node for node in result.proto.graph.node for name in node.output}
    gemms = [n for n in result.proto.graph.node if n.op_type == "Gemm"]
    assert len(gemms) >= 9
    for gemm in gemms:
        x, w, b = (producer[name] for name in gemm.input)
        assert {a.name: a.i for a in w.attribute}.get("axis", 1) == 0
        assert not array(tensors[w.input[2]]).any(), "written out, or ONNX Runtime leaves the product in float"
        stored, scale = w.input[0], tensors[w.input[1]]
        if bits <= 4:
            cast = producer[stored]
            assert cast.op_type == "Cast" and cast.attribute[0].i == TensorProto.INT8
            stored = cast.input[0]
        weight = tensors[stored]
        codes = array(weight).astype(int)
        assert codes.ndim == 2 and list(scale.dims) == [codes.shape[0]] and bool((array(scale) > 0).all())
        # a channel's codes span 2^b consecutive integers around 0: where there is room, the zero point is folded in
        assert int((codes.max(1) - codes.min(1)).max()) <= 2**bits - 1 and codes.min() <= 0 <= codes.max()
        assert int((codes.max(1) - codes.min(1)).max()) > 2 ** (bits - 1), "a bit is not used"
        assert weight.data_type == (TensorProto.INT4 if bits <= 4 else TensorProto.INT8)
        assert not weight.int32_data and len(weight.raw_data) == (
            math.ceil(codes.size / 2) if bits <= 4 else codes.size
        )
        bias, bias_scale, x_scale = tensors[b.input[0]], array(tensors[b.input[1]]), array(tensors[x.input[1]])
        assert bias.data_type == TensorProto.INT32 and len(b.input) == 2
        assert np.array_equal(bias_scale, x_scale * array(scale))


def test_the_file_takes_any_batch(case: tuple[str, int, CompiledModel]) -> None:
    name, _, result = case
    x, runner = inputs(name, 3, seed=7), session(result.to_bytes(), threads=1)
    three = runner.run(None, {"x": x.numpy()})[0]
    ones = np.concatenate([runner.run(None, {"x": x[i:i + 1].numpy()})[0] for i in range(3)])
    assert three.shape == ones.shape == (3, 5)
    assert np.abs(three - ones).max() <= 0.05 * np.abs(three).max()
    assert not np.allclose(three[0], three[1])
    assert not np.allclose(three, 0)


def test_quality_grows_with_the_bits() -> None:
    """Eight bits are close to the float model, two are not: the number of bits is no mere label."""
    found = [compiled("vit", bits).report["output_sqnr_db"] for bits in BITS]
    assert found[6] > 18 and found[0] < 5 and found[0] < found[2] < found[4]


def test_size_of_the_weights() -> None:
    four, eight = (compiled("vit", bits).proto for bits in (4, 8))
    weights = sum(math.prod(t.dims) for t in eight.graph.initializer if t.data_type == TensorProto.INT8)
    assert weights > 20000
    saved = len(eight.SerializeToString()) - len(four.SerializeToString())
    assert weights // 2 - 8000 < saved < weights // 2 + 1000  # less the Cast nodes and the Mins


def test_names_are_module_paths() -> None:
    result = compiled("vit", 4)
    names = [n.name for n in result.proto.graph.node]
    assert len(set(names)) == len(names) and all(names)
    assert {
        "blocks.0.attn.qkv/Gemm",
        "blocks.1.mlp.fc2/Gemm",
        "blocks.0.attn/Log2Softmax",
        "head/Gemm",
        "patch_embed.proj/Gemm",
        "blocks.1.norm1/LayerNormalization",
        "blocks.0.attn.qkv/QuantizeLinear",
    } <= set(names)
    assert {"blocks.0.attn.qkv.weight_quantized", "blocks.0.attn.qkv.weight_scale", "blocks.0.attn.qkv.bias_quantized",
            "blocks.0.attn.qkv.input_scale", "blocks.0.attn.qkv.input_zero_point", "blocks.1.attn.probabilities_scale",
            "blocks.0.norm1.weight", "pos_embed"} <= set(initializers(result.proto))
    values = {name for n in result.proto.graph.node for name in n.output}
    assert {
        "blocks.0.attn.qkv.input_quantized",
        "blocks.0.attn.qkv.input_dequantized",
        "blocks.0.attn.probabilities_dequantized",
        "blocks.0.attn.qkv.weight_dequantized",
    } <= values
    assert [i.name for i in result.proto.graph.input] == ["x"] and [o.name for o in result.proto.graph.output] == [
        "output"
    ]


def test_swin_names_are_module_paths() -> None:
    names = {n.name for n in compiled("swin", 4, method="repquant").proto.graph.node}
    assert {"layers.0.blocks.1.attn.qkv/Gemm", "layers.1.downsample.reduction/Gemm", "head.fc/Gemm"} <= names


def test_every_operator_of_a_layer_is_named_after_it(case: tuple[str, int, CompiledModel]) -> None:
    _, _, result = case
    paths = {e["path"] for e in result.report["layers"]}
    products = {n.name.rpartition("/")[0] for n in result.proto.graph.node if n.op_type in PRODUCTS}
    assert products == paths


def test_metadata(case: tuple[str, int, CompiledModel]) -> None:
    name, bits, result = case
    entries = {e.key: e.value for e in result.proto.metadata_props}
    assert set(entries) == {
        f"repquant_fx.{k}" for k in ("version", "method", "bits", "recipe", "preprocessing", "layers")
    }
    assert (
        entries["repquant_fx.version"] == repquant_fx.__version__ and entries["repquant_fx.bits"] == f"W{bits}A{bits}"
    )
    assert Recipe.from_dict(json.loads(entries["repquant_fx.recipe"])) == Recipe.from_dict(result.report["recipe"])
    assert json.loads(entries["repquant_fx.preprocessing"])["input_size"] == list(inputs(name).shape[1:])


def test_nothing_of_the_machine_is_in_the_file() -> None:
    data = compiled("vit", 4).to_bytes()
    for text in (b".py", b"site-packages", b"Traceback", b"File \""):
        assert text not in data


def test_same_seed_same_bytes() -> None:
    again = compiled.__wrapped__("vit", 4, method="repquant")
    assert again.to_bytes() == compiled("vit", 4, method="repquant").to_bytes()
    measured = {"peak_memory_mb", "peaks_mb", "seconds"}  # of the process, whatever it did before
    assert {k: v for k, v in again.report.items() if k not in measured} == \
        {k: v for k, v in compiled("vit", 4, method="repquant").report.items() if k not in measured}


# ---- a file that is wrong is caught ----------------------------------------------------------------------------------


def compared(change: Callable[[onnx.ModelProto], None], bits: int = 4) -> Parity:
    result = compiled("vit", bits)
    proto = onnx.ModelProto()
    proto.CopyFrom(result.proto)
    change(proto)
    assert proto.SerializeToString() != result.proto.SerializeToString()
    return compare(result.graph_module, proto, result.quantizers, [inputs("vit", 6, seed=5)], ["x"])


def store(proto: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    tensor = initializers(proto)[name]
    if tensor.data_type == TensorProto.INT4:
        packed = bytearray(tensor.raw_data)
        low = array(tensor).astype(np.int64).reshape(-1)
        change(low)
        nibbles = np.concatenate([low, np.zeros(low.size % 2, np.int64)]) & 15
        packed[:] = bytes((nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8))
        tensor.raw_data = bytes(packed)
        return
    values = array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def multiply(factor: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values *= np.float32(factor)
    return change


def add(amount: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values += values.dtype.type(amount)
    return change


def first(value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values.reshape(-1)[0] = value
    return change


def far(values: np.ndarray) -> None:
    """One weight code goes to the other end of the grid."""
    values.reshape(-1)[0] = 7 if values.reshape(-1)[0] < 0 else -8


def test_an_untouched_copy_passes() -> None:
    result = compiled("vit", 4)
    found = compare(result.graph_module, result.proto, result.quantizers, [inputs("vit", 6, seed=5)], ["x"])
    assert found.problems() == []
    found.raise_on_problems()


@pytest.mark.parametrize("name, change", [
    ("blocks.0.attn.qkv.input_scale", multiply(1.1)),
    ("blocks.0.attn.qkv.input_zero_point", add(1)),
    ("blocks.1.attn.query_scale", multiply(1.1)),
    ("blocks.0.attn.probabilities_scale", multiply(1.5)),
    ("blocks.1.mlp.fc1.weight_scale", multiply(1.2)),
    # not its scale: integer kernels take that to be input's times weight's
    ("blocks.0.mlp.fc2.bias_quantized", add(40)),
    ("blocks.1.norm2.bias", add(1)),
    ("head/Min.top", first(7)),
    ("patch_embed.proj.weight_patches_quantized", far),
    ("blocks.0.attn.qkv.weight_quantized", far),
    ("blocks.0.attn.proj.weight_quantized", far),
    ("blocks.1.mlp.fc2.weight_quantized", far),
    ("head.weight_quantized", far),
], ids=lambda v: v if isinstance(v, str) else "")
def test_one_changed_constant_is_caught(name: str, change: Callable[[np.ndarray], None]) -> None:
    found = compared(lambda proto: store(proto, name, change))
    assert found.problems()
    with pytest.raises(ParityError, match="ONNX Runtime and the FX reference disagree"):
        found.raise_on_problems()
    assert not found.to_dict()["agrees"]


def test_a_changed_scale_is_caught_where_it_is() -> None:
    found = compared(lambda proto: store(proto, "blocks.1.mlp.fc1.input_scale", multiply(1.3)))
    wrong = [problem.partition(":")[0] for problem in found.problems()]
    assert wrong[0] == "blocks.1.mlp.fc1/input"
    assert not [w for w in wrong if w.startswith("blocks.0") or w.startswith("patch_embed")], (
        "what comes before is not at fault"
    )


def test_changed_bits_of_the_softmax_are_caught() -> None:
    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.name == "blocks.1.attn/Log2Softmax")
        attribute = next(a for a in node.attribute if a.name == "steps")
        attribute.i = 3 - attribute.i

    found = compared(change)
    assert any(p.startswith("blocks.1.attn/probabilities") for p in found.problems())


def test_a_changed_operator_is_caught() -> None:
    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.op_type == "Gelu")
        node.op_type = "Relu"
        del node.attribute[:]

    assert compared(change).problems()


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, x) == math.inf
    assert sqnr(torch.tensor([3.0, 4.5]), x) == pytest.approx(20.0)
    assert sqnr(torch.tensor([3.0, 4.0]), torch.zeros(2)) < -1000


def test_noise_is_measured_where_the_reference_is_finite() -> None:
    reference = torch.tensor([3.0, float("inf"), float("nan"), 4.0])
    assert signal_and_noise(reference.clone(), reference) == (25.0, 0.0)
    assert signal_and_noise(torch.tensor([3.0, 1.0, 1.0, float("nan")]), reference) == (25.0, 16.0)
    assert sqnr(torch.tensor([3.0, 4.0]), reference) == 0.0
