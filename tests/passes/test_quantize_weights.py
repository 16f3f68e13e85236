"""Quantize weights: what stands in the graph is exactly what the codes say."""

from __future__ import annotations

import pytest
import torch
from helpers import canonical, images, quantized, redraw, sequences, vit
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import attribute, shared_copy
from repquant_fx.quantizers.gptq import symmetric_range
from repquant_fx.recipe import LayerRule, Recipe

PLAIN = {"correction": False}


def name_of(consumer: Node) -> str:
    """Name of the weight whose codes `consumer` reads."""
    return str(consumer.args[1].args[0].target).removesuffix("_quantized")  # type: ignore[union-attr]


def value_of(graph_module: GraphModule, consumer: Node) -> Tensor:
    """The weight that `consumer` computes with."""
    dequantize = consumer.args[1]
    assert isinstance(dequantize, Node) and dequantize.target is torch.ops.repquant_fx.dequantize.default
    codes, scale = (attribute(graph_module, n) for n in dequantize.args[:2])  # type: ignore[arg-type]
    return dequantize.target(codes, scale, *dequantize.args[2:])


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_times_scale_is_the_weight_in_the_graph(encoder_graph, bits: int) -> None:
    run = quantized(encoder_graph(), Recipe(wbits=bits, abits=8), list(sequences().split(8)))
    consumers = [c for g in run.plan.groups if g.kind != "matmul" for c in g.consumers]
    assert set(run.weights) == set(consumers) and len(consumers) == 8
    for consumer, weight in run.weights.items():
        found = value_of(run.graph_module, consumer)
        assert weight.codes.dtype == torch.int8 and weight.scale.dtype == found.dtype == torch.float32
        assert torch.equal(found, weight.codes.float() * weight.scale[:, None])
        rows = weight.codes.int()
        assert int((rows.amax(1) - rows.amin(1)).max()) <= (1 << bits) - 1
        if bits in (4, 8):
            low, high = symmetric_range(bits)
            assert int(rows.min()) >= low and int(rows.max()) <= high
        assert int(rows.unique().numel()) > 1


def test_gptq_is_never_worse_than_nearest(vit_graph) -> None:
    run = quantized(vit_graph(), Recipe(wbits=3, abits=8, **PLAIN), list(images(16).split(4)))
    assert set(run.result.errors) == set(run.weights)
    assert all(chosen <= nearest * (1 + 1e-6) for nearest, chosen in run.result.errors.values())
    assert sum(c for _, c in run.result.errors.values()) < 0.9 * sum(n for n, _ in run.result.errors.values())


def test_without_gptq_the_codes_are_the_nearest(encoder_graph) -> None:
    run = quantized(
        encoder_graph(), Recipe(wbits=4, abits=8, gptq=False, norm="layerwise", **PLAIN), list(sequences().split(8))
    )
    for consumer, weight in run.weights.items():
        name = name_of(consumer)
        original = run.reference.get_parameter(name).detach()
        codes = torch.round(original / weight.scale[:, None]).clamp(-8, 7)
        assert torch.equal(codes, weight.codes.float()), name
    assert not run.result.errors


def test_rules_by_layer(encoder_graph) -> None:
    rules = (
        LayerRule("blocks.0.fc1", wbits=2),
        LayerRule("blocks.0.k", wbits=8),
        LayerRule("blocks.0.fc2", gptq=False),
    )
    run = quantized(encoder_graph(), Recipe(wbits=4, abits=8, layers=rules, **PLAIN), list(sequences().split(8)))
    spans, same = {}, {}
    for consumer, weight in run.weights.items():
        name = name_of(consumer).removesuffix(".weight")
        spans[name] = int((weight.codes.int().amax(1) - weight.codes.int().amin(1)).max())
        if consumer in run.result.errors:
            same[name] = run.result.errors[consumer][0] == run.result.errors[consumer][1]
    assert spans["blocks.0.fc1"] <= 3 and spans["blocks.0.k"] > 15 and 3 < spans["blocks.0.q"] <= 15
    assert same.get("blocks.0.fc2", True) and not same["blocks.0.fc1"]


def test_a_skipped_layer_keeps_its_weight(encoder_graph) -> None:
    run = quantized(encoder_graph(), Recipe(wbits=3, layers=(LayerRule("blocks.0.fc2", skip=True),)), [sequences()])
    assert torch.equal(
        run.graph_module.get_parameter("blocks.0.fc2.weight"), run.reference.get_parameter("blocks.0.fc2.weight")
    )
    assert "blocks.0.fc2.weight" not in {name_of(c) for c in run.weights}


def test_convolutions() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.depthwise, self.head = (
                nn.Conv2d(3, 8, 3, 2, 1),
                nn.Conv2d(8, 8, 3, 1, 1, groups=8),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.depthwise(torch.relu(self.stem(x))).mean((2, 3)))

    run = quantized(canonical(redraw(Stem()), images()), Recipe(wbits=4, abits=8), list(images(16).split(4)))
    shapes = {tuple(w.codes.shape) for w in run.weights.values()}
    assert shapes == {(8, 3, 3, 3), (8, 1, 3, 3), (3, 8)}
    for consumer, weight in run.weights.items():
        found = value_of(run.graph_module, consumer)
        assert torch.equal(found, weight.codes.float() * weight.scale.reshape(-1, *[1] * (found.ndim - 1)))


def test_the_correction_sets_the_mean_output(encoder_graph) -> None:
    """With it, the mean of the quantized model's output on the calibration data is the float model's."""
    x, error = sequences(64), {}
    for correction in (False, True):
        run = quantized(encoder_graph(), Recipe(wbits=3, abits=4, correction=correction), list(x.split(16)))
        with torch.no_grad():
            error[correction] = float((run.graph_module(x).mean(0) - run.reference(x).mean(0)).abs().max())
    assert error[True] < 1e-4 < error[False]


def test_a_weight_read_twice_is_quantized_for_each_reader() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(self.norm(x))))

    run = quantized(canonical(redraw(Tied()), sequences()), Recipe(), list(sequences().split(8)))
    assert len(run.weights) == 2
    with torch.no_grad():
        noise = (run.graph_module(sequences()) - run.reference(sequences())).square().mean() / run.reference(
            sequences()
        ).square().mean()
    assert float(noise) < 1e-3


def test_dead_inputs_and_dead_rows() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = redraw(Dead())
    with torch.no_grad():
        model.a.weight[3:6], model.a.bias[3:6] = 0, -1  # after relu these inputs of b are always zero
        model.b.weight[1], model.b.bias[1] = 0, 2.5
    for changes in ({}, PLAIN):
        run = quantized(canonical(model, sequences()), Recipe(wbits=4, **changes), list(sequences().split(8)))
        with torch.no_grad():
            found = run.graph_module(sequences())
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found[..., 1], torch.full((32, 6), 2.5), atol=1e-2, rtol=0)


def test_weights_keep_their_names() -> None:
    run = quantized(canonical(vit(1), images()), Recipe(), [images()])
    names = {name_of(c) for c in run.weights}
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "head.weight"} <= names


def test_no_float_copy_of_a_quantized_weight_is_kept(encoder_graph) -> None:
    run = quantized(encoder_graph(), Recipe(), list(sequences().split(8)))
    kept = {n: t for n, t in run.graph_module.state_dict().items() if t.ndim == 2}
    assert kept and all(t.dtype == torch.int8 for n, t in kept.items()), list(kept)
    with pytest.raises(AttributeError):
        run.graph_module.get_parameter("blocks.0.fc1.weight")
    shared = shared_copy(run.reference)
    assert (
        all(a is b for a, b in zip(shared.parameters(), run.reference.parameters()))
        and shared.graph is not run.reference.graph
    )
