"""Lower to Q/DQ: the lowered graph computes what the fake-quantized graph computed."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Encoder,
    PostNorm,
    Run,
    aten,
    calibrate,
    canonical,
    count,
    images,
    observed,
    output,
    quantized,
    redraw,
    relative,
    sequences,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.parity import sqnr
from repquant_fx.passes.base import attribute, run_pass, run_passes
from repquant_fx.passes.insert_observers import SLOTS
from repquant_fx.passes.lower_to_qdq import Lowered, LowerToQDQ
from repquant_fx.passes.operators import DEQUANTIZE, LOG2_SOFTMAX, QUANTIZE
from repquant_fx.passes.slots import install, slot_module
from repquant_fx.quantizers.bias import LIMIT
from repquant_fx.quantizers.observers import Passthrough
from repquant_fx.recipe import Recipe


def lowered(run: Run) -> tuple[GraphModule, Lowered]:
    """A lowered graph; the fake-quantized one in `run` is used up."""
    return run.graph_module, run_pass(run.graph_module, LowerToQDQ(run.plan, run.weights))


def check(graph_module: GraphModule, x: Tensor, recipe: Recipe, floor: float = 30.0) -> GraphModule:
    run = quantized(graph_module, recipe, list(x.split(8)))
    names = [s.name for g in run.plan.groups for s in g.sites]
    expected = output(run.graph_module, x)
    result, made = lowered(run)
    assert sqnr(output(result, x), expected) > floor
    assert output(result, x[:3]).shape == expected[:3].shape
    assert sqnr(output(result, x[:3]), expected[:3]) > floor
    assert not any(n.op == "call_module" for n in result.graph.nodes) and not hasattr(result, SLOTS)
    assert sorted(made.quantizers) == sorted(names)
    assert all(n.graph is result.graph for n in made.quantizers.values())
    alive = set(result.graph.nodes)
    assert set(made.quantizers.values()) <= alive
    for node in alive:
        if node.op == "call_function":
            assert "val" in node.meta, node
        if node.op == "call_function" and node.target is QUANTIZE:
            assert attribute(result, node.args[2]).dtype == torch.uint8
    return result


@pytest.mark.parametrize("name", ["vit_graph", "swin_graph", "encoder_graph"])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_fake_quantized_graph(name: str, bits: int, request: pytest.FixtureRequest) -> None:
    x = sequences() if name == "encoder_graph" else images(16)
    check(request.getfixturevalue(name)(), x, Recipe(wbits=bits, abits=bits), floor=30 if bits == 8 else 18)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layerwise"},
        {"norm": "channelwise"},
        {"softmax": "log2"},
        {"softmax": "uniform"},
        {"gptq": False},
        {"clipping": "none"},
    ],
    ids=str,
)
def test_switches(encoder_graph, changes: dict[str, object]) -> None:
    graph_module = check(encoder_graph(), sequences(), Recipe(**changes))  # type: ignore[arg-type]
    assert count(graph_module, LOG2_SOFTMAX) == (changes.get("softmax") != "uniform")
    assert count(graph_module, aten.softmax.int) == (changes.get("softmax") == "uniform")


@pytest.mark.parametrize(
    "make", [lambda: Encoder(norm="rms", bias=False), lambda: Encoder(norm="plain", causal=True), PostNorm]
)
def test_other_models(make) -> None:
    check(canonical(redraw(make()), sequences()), sequences(), Recipe())


def test_without_biases_it_is_exact_but_for_ties() -> None:
    """With no bias to round, nothing but float summation order may differ."""
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    check(canonical(redraw(Plain()), sequences()), sequences(), Recipe(wbits=4, abits=4, correction=False), floor=60)


def test_one_quantizer_serves_query_key_and_value(encoder_graph) -> None:
    graph_module, _ = lowered(quantized(encoder_graph(), Recipe(), [sequences()]))
    linears = {str(n.args[1].args[0].target): n for n in graph_module.graph.nodes if n.target is aten.linear.default}
    inputs = {linears[f"blocks.0.{name}.weight_quantized"].args[0] for name in "qkv"}
    assert len(inputs) == 1 and inputs.pop().target is DEQUANTIZE
    # embed, q/k/v, query, key, value, proj, fc1, fc2, head
    assert count(graph_module, QUANTIZE) == 9 and len(linears) == 8


def test_constants(vit_graph) -> None:
    graph_module, _ = lowered(quantized(vit_graph(), Recipe(wbits=4, abits=6), [images(16)]))
    seen = 0
    for node in graph_module.graph.nodes:
        if node.target is not aten.linear.default:
            continue
        activation, weight, bias = node.args
        codes = attribute(graph_module, weight.args[0])
        assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
        assert weight.args[3:] == (4, 0) and weight.args[2] is None
        assert bias.target is DEQUANTIZE and attribute(graph_module, bias.args[0]).dtype == torch.int32
        scales = [attribute(graph_module, n.args[1]) for n in (activation, weight, bias)]
        assert torch.equal(scales[2], scales[0] * scales[1])  # what an integer kernel accumulates in
        assert node.args[0].args[0].target is QUANTIZE and len(node.meta["val"].shape) == 2
        seen += 1
    assert seen == 10
    for node in graph_module.graph.nodes:
        if node.target is QUANTIZE:
            _, scale, zero, bits, _ = node.args
            assert bits in (6, 8) and float(attribute(graph_module, scale)) > 0
            assert 0 <= int(attribute(graph_module, zero)) < 1 << bits


def test_no_float_weight_remains(vit_graph) -> None:
    graph_module, _ = lowered(quantized(vit_graph(), Recipe(), [images(16)]))
    read = [attribute(graph_module, n) for n in graph_module.graph.nodes if n.op == "get_attr"]
    assert max(t.numel() for t in read if t.dtype == torch.float32) <= 17 * 32  # the position table
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"]
    assert "blocks.0.attn.qkv.weight_quantized" in names and "blocks.0.attn.qkv.input_scale" in names


def test_codes_are_those_of_the_quantizers(encoder_graph) -> None:
    from helpers import values_at

    x = sequences()
    run = quantized(encoder_graph(), Recipe(abits=4), list(x.split(8)))
    site = run.plan.groups[0].sites[0]  # reads the model's input: equal for both graphs
    module = slot_module(run.graph_module, site)
    expected = module.codes(x)  # type: ignore[operator]
    graph_module, made = lowered(run)
    (found,) = values_at(graph_module, [made.quantizers[site.name]], x)
    assert found.dtype == torch.uint8 and torch.equal(found.float().reshape(x.shape), expected)


def test_dead_rows_keep_their_bias_in_integers() -> None:
    model = redraw(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[2], model[2].bias[2] = 0, 7.0
        model[2].weight[0] *= 1e-30  # not dead: its steps become as large as the bias needs
    recipe = Recipe(wbits=4, correction=False)
    graph_module = check(canonical(model, sequences()), sequences(), recipe)
    torch.testing.assert_close(output(graph_module, sequences())[..., 2], torch.full((32, 6), 7.0), atol=0.05, rtol=0)
    biases = [n.args[2].op for n in graph_module.graph.nodes if n.target is aten.linear.default]
    assert biases == ["call_function", "call_function"]
    run = quantized(canonical(model, sequences()), recipe, [sequences()])
    lowering = LowerToQDQ(run.plan, run.weights)
    run_pass(run.graph_module, lowering)
    assert not lowering.left_alone
    for linear in (n for n in graph_module.graph.nodes if n.target is aten.linear.default):
        assert bool((attribute(graph_module, linear.args[2].args[0]).double().abs() < LIMIT).all())


def test_a_whole_layer_of_zeros() -> None:
    model = redraw(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)))
    with torch.no_grad():
        model[1].weight.zero_()
    for correction in (True, False):
        graph_module = check(canonical(model, sequences()), sequences(), Recipe(correction=correction))
        torch.testing.assert_close(output(graph_module, sequences()), model[1].bias.expand(32, 6, 4), atol=2e-3, rtol=0)


def test_linears_that_read_each_other_directly() -> None:
    model = redraw(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 4)))
    # one each and one more
    assert count(check(canonical(model, sequences()), sequences(), Recipe()), aten.reshape.default) == 4


def test_convolutions() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.stem(x)).flatten(2).transpose(1, 2))

    graph_module = check(canonical(redraw(Stem()), images(16)), images(16), Recipe())
    (conv,) = [n for n in graph_module.graph.nodes if n.target is aten.conv2d.default]
    assert [a.target for a in conv.args[:3]] == [DEQUANTIZE] * 3
    assert attribute(graph_module, conv.args[1].args[0]).shape == (8, 3, 3, 3)


def test_channelwise_zero_points_that_cannot_be_stored() -> None:
    """A channel far from zero has a zero point outside the codes: the activation is moved instead."""
    model = redraw(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([30.0, -30.0, 8.0])
    graph_module = check(canonical(model, sequences()), sequences(), Recipe(norm="channelwise"))
    (node,) = [n for n in graph_module.graph.nodes if n.target is QUANTIZE]
    assert attribute(graph_module, node.args[1]).shape == (8,) and node.args[0].target is aten.add.Tensor


def test_passthrough_disappears(encoder_graph) -> None:
    graph_module = encoder_graph()
    expected = output(graph_module, sequences())
    plan = observed(graph_module, [sequences()])
    for group in plan.groups:
        for site in group.sites:
            install(graph_module, site, Passthrough())
    run_passes(graph_module, [LowerToQDQ(plan, {})])
    assert not any(n.op == "call_module" for n in graph_module.graph.nodes)
    assert relative(output(graph_module, sequences()), expected) < 1e-6


def test_activations_alone(encoder_graph) -> None:
    """MatMul groups need no weights."""
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    graph_module, recipe = canonical(Attention(), sequences()), Recipe()
    plan = observed(graph_module, [sequences()], recipe)
    calibrate(graph_module, recipe, *plan.groups)
    expected = output(graph_module, sequences())
    run_passes(graph_module, [LowerToQDQ(plan, {})])
    assert sqnr(output(graph_module, sequences()), expected) > 40
    assert count(graph_module, LOG2_SOFTMAX) == 1 and count(graph_module, QUANTIZE) == 3
