"""Linears that write codes: the same codes at every quantizer, moved about as bytes."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Encoder,
    aten,
    canonical,
    count,
    fused_as_promised,
    images,
    output,
    quantized,
    redraw,
    sequences,
    values_at,
)
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.parity import sqnr
from repquant_fx.passes.base import attribute, run_pass, run_passes
from repquant_fx.passes.fuse_requantization import FuseRequantization
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.operators import DEQUANTIZE, QUANTIZE
from repquant_fx.recipe import LayerRule, Recipe


def lowered(graph_module: GraphModule, x: Tensor, **changes: object) -> tuple[GraphModule, dict[str, Node]]:
    run = quantized(graph_module, Recipe(**changes), [x])  # type: ignore[arg-type]
    return run.graph_module, run_pass(run.graph_module, LowerToQDQ(run.plan, run.weights)).quantizers


def fused_outputs(graph_module: GraphModule) -> list[Node]:
    """Quantizers with scale 1 that stand right behind a Linear."""
    return [n for n in graph_module.graph.find_nodes(op="call_function", target=QUANTIZE)
            if n.args[0].target is aten.linear.default and float(attribute(graph_module, n.args[1])) == 1]


def check(graph_module: GraphModule, x: Tensor, floor: float = 35, **changes: object) -> tuple[GraphModule, int]:
    """Fuse; compare codes at every quantizer and the output. Returns the graph and how many Linears write codes."""
    after, quantizers = lowered(graph_module, x, **changes)
    expected = output(after, x)
    fuse = FuseRequantization(quantizers)
    fused = fused_as_promised(after, fuse, x)
    found = fused.quantizers
    assert set(found) == set(quantizers) and all(n in set(after.graph.nodes) for n in found.values())
    assert list(fused.codes) == [n.args[0].name for n in fused_outputs(after)]
    assert sqnr(output(after, x), expected) > floor
    assert output(after, x[:3]).shape == expected[:3].shape
    assert not FuseRequantization(found).run(after).modified  # nothing left to do
    return after, len(fused_outputs(after))


def test_one_linear_for_query_key_and_value(vit_graph) -> None:
    after, fused = check(vit_graph(), images(16))
    assert fused == 2  # one qkv a block
    assert count(after, QUANTIZE) < count(lowered(vit_graph(), images(16))[0], QUANTIZE)
    # 1/sqrt(d) is in the scales
    assert not [n for n in after.graph.nodes if n.target is aten.mul.Tensor and isinstance(n.args[1], float)]


def test_windows(swin_graph) -> None:
    _, fused = check(swin_graph(), images(16))
    assert fused == 3


@pytest.mark.parametrize("bias", [True, False])
def test_separate_linears_with_and_without_bias(bias: bool) -> None:
    after, fused = check(canonical(redraw(Encoder(bias=bias)), sequences()), sequences())
    assert fused == 3
    for node in fused_outputs(after):
        assert node.args[0].args[2].target is DEQUANTIZE  # the norm before brought one where there was none


def test_scales_are_in_the_weights(encoder_graph) -> None:
    """Row r of the fused weight's scale is the old one over the operand's scale (times 1/sqrt(d) where the query has
    it).
    """
    x = sequences()
    before, quantizers = lowered(encoder_graph(), x)

    def linear_scales(graph_module: GraphModule) -> dict[str, Tensor]:
        return {str(n.args[1].args[0].target): attribute(graph_module, n.args[1].args[1]).double()
                for n in graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)}

    old = linear_scales(before)
    operand = {
        name.rsplit("/", 1)[1]: float(attribute(before, node.args[1]))
        for name, node in quantizers.items()
        if node.target is QUANTIZE
    }
    new = linear_scales(run_passes(before, [FuseRequantization(quantizers)]))
    assert set(old) == set(new)
    ratios = {name: old[name] / new[name] for name in old}
    for letter, kind in (("v", "value"), ("k", "key"), ("q", "query")):
        ratio = next(r for n, r in ratios.items() if n.startswith(f"blocks.0.{letter}."))
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)
        quotient = float(ratio[0]) / operand[kind]
        assert any(abs(quotient - f) < 1e-5 * f for f in (1.0, 8**0.5, 8**0.25)), (letter, quotient)
    for name, ratio in ratios.items():
        if not name.startswith(("blocks.0.q.", "blocks.0.k.", "blocks.0.v.")):
            assert torch.equal(ratio, torch.ones_like(ratio))


class Reads(nn.Module):
    """A Linear read by an attention product and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return a @ b.transpose(1, 2) + a.sum(-1, keepdim=True)


def test_a_linear_with_a_float_reader_stays() -> None:
    after, fused = check(canonical(redraw(Reads()), sequences()), sequences())
    assert [n.args[0].args[1].args[0].target for n in fused_outputs(after)] == ["b.weight_quantized"] and fused == 1


def test_float_operands_stay(encoder_graph) -> None:
    """Products that the recipe leaves in float read floats."""
    _, fused = check(encoder_graph(), sequences(), layers=(LayerRule("blocks.0", skip=True),))
    assert fused == 0


def test_four_bits(vit_graph) -> None:
    """Codes saturate at the operands' top code; bias and zero point are whole steps of the accumulator, which is coarse
    here.
    """
    after, fused = check(vit_graph(), images(16), wbits=4, abits=4, floor=20)
    assert fused == 2 and {n.args[3] for n in fused_outputs(after)} == {4}


def test_one_operand_keeps_its_codes(encoder_graph) -> None:
    """Nothing is rounded where each Linear feeds one operand."""
    x = sequences()
    before, quantizers = lowered(encoder_graph(), x, wbits=4, abits=4)
    names = list(quantizers)
    expected = values_at(before, [quantizers[n] for n in names], x)
    found = run_pass(before, FuseRequantization(quantizers)).quantizers
    for name, old, new in zip(names, expected, values_at(before, [found[n] for n in names], x)):
        assert float((old != new).float().mean()) < 1e-3, name


def test_a_coarse_accumulator_is_left_alone(vit_graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repquant_fx.passes.fuse_requantization.SLACK", 0.0)
    before, quantizers = lowered(vit_graph(), images(8))
    fuse = FuseRequantization(quantizers)
    run_passes(before, [fuse])
    assert not fused_outputs(before) and len(fuse.left_alone) == 2 and "of a code" in fuse.left_alone[0].reason


def test_outputs_in_codes_are_measured_as_floats(vit_graph) -> None:
    from repquant_fx.report import layer_sqnr

    x = images(8)
    before, quantizers = lowered(vit_graph(), x)
    names = [n.name for n in before.graph.nodes if n.target is aten.linear.default]
    unfused = layer_sqnr(vit_graph(), before, names, [x])
    fused = run_pass(before, FuseRequantization(quantizers))
    found = layer_sqnr(vit_graph(), before, [*names, "no such node"], [x], fused.codes)
    assert fused.codes.keys() < set(names) and found.keys() == set(names)
    for name in names:
        assert found[name] == pytest.approx(unfused[name], abs=1), name
