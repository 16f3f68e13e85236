"""From a model in memory to a checked file, the whole method: unequal bits, reduced methods, the report. test_parity.py
looks into the file.
"""

from __future__ import annotations

import json
from functools import cache

import onnx
import pytest
import torch
from helpers import vit

from repquant_fx import CompiledModel, InputError, Recipe, compile
from repquant_fx.passes.base import attribute
from repquant_fx.passes.operators import QUANTIZE

SHAPE = (3, 16, 16)


def data(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@cache
def compiled(wbits: int = 4, abits: int = 4) -> CompiledModel:
    return compile(
        vit(), recipe=Recipe(wbits=wbits, abits=abits), calibration=data(), samples=40, example_inputs=(data(2),)
    )


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in proto.graph.initializer}


@pytest.mark.parametrize("bits", [(4, 4), (2, 7), (7, 3)])
def test_codes_equal_with_unequal_bits(bits: tuple[int, int]) -> None:
    result = compiled(*bits)
    assert result.parity is not None and not result.parity.problems()
    assert result.parity.share < 0.01 and result.parity.output_step < 1e-4
    assert {n.args[3] for n in result.graph_module.graph.nodes if n.target is QUANTIZE} <= {bits[1], 8}


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


@pytest.mark.slow
def test_every_reduced_method_exports_and_agrees() -> None:
    for change in (
        {"norm": "channelwise"},
        {"norm": "layerwise"},
        {"softmax": "log2"},
        {"softmax": "uniform"},
        {"gptq": False},
        {"correction": False, "clipping": "adam", "softmax": "log_sqrt2"},
    ):
        result = compile(
            vit(depth=1),
            recipe=Recipe(wbits=4, abits=6, **change),
            calibration=data(),
            samples=40,
            example_inputs=(data(2),),
        )
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
