"""The pipeline: linear cost, bounded memory, the same result each time, and better with each method it adds."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from helpers import Encoder, Run, canonical, images, output, plant, quantized, redraw, sequences, vit
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.errors import CalibrationError
from repquant_fx.parity import sqnr
from repquant_fx.pipeline import quantize_sequentially
from repquant_fx.pipeline.runner import SegmentRunner
from repquant_fx.recipe import PRESETS, Recipe


def quality(run: Run, x: Tensor) -> float:
    return sqnr(output(run.graph_module, x), output(run.reference, x))


def batches(x: Tensor, parts: int = 4) -> list[Tensor]:
    return list(x.split(len(x) // parts))


@pytest.fixture(scope="module")
def deeper() -> dict[int, GraphModule]:
    """Encoders of 1, 2 and 4 blocks."""
    return {depth: canonical(redraw(Encoder(depth, width=8)), sequences()) for depth in (1, 2, 4)}


@pytest.mark.parametrize("correction", [False, True])
def test_cost_grows_linearly_with_depth(deeper, correction: bool) -> None:
    x, runs, sizes = sequences(8), {}, {}
    for depth, graph_module in deeper.items():
        sizes[depth] = sum(n.op == "call_function" for n in graph_module.graph.nodes)
        runs[depth] = quantized(
            graph_module, Recipe(wbits=4, abits=4, correction=correction, clipping="none"), batches(x, 2)
        ).result
    executed = {d: r.node_executions for d, r in runs.items()}
    first, second = executed[2] - executed[1], (executed[4] - executed[2]) / 2
    assert abs(first - second) <= 0.05 * first
    assert runs[2].segments - runs[1].segments == (runs[4].segments - runs[2].segments) / 2 >= 1
    for depth, total in executed.items():
        # observe, second moments, advance: each node runs a few times per batch, whatever the depth
        assert total <= 8 * 2 * sizes[depth], "nodes are run again and again"


def test_the_prefix_never_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes before a segment are run at no time after it began; and only values that someone still reads are kept."""
    x = sequences(8)
    frontier: dict[GraphModule, Node] = {}
    execute, advance, advanced = SegmentRunner._execute, SegmentRunner.advance, []

    def watched_execute(self: SegmentRunner, nodes: list[Node], env: dict[Node, object], keep: set[Node]):
        start = frontier.get(self.graph_module)
        if start is not None:
            order = {n: i for i, n in enumerate(self.graph_module.graph.nodes)}
            assert all(order[n] >= order[start] for n in nodes)
        return execute(self, nodes, env, keep)

    def watched_advance(self: SegmentRunner, first: Node, stop: Node) -> None:
        advance(self, first, stop)
        frontier[self.graph_module] = stop
        order = {n: i for i, n in enumerate(self.graph_module.graph.nodes)}
        for cut in self.cuts:
            assert cut, "nothing is live in the middle of a model"
            for node in cut:
                assert order[node] < order[stop] and any(order[u] >= order[stop] for u in node.users), f"{node} is dead"
        advanced.append(sum(v.numel() for v in self.cuts[0].values() if isinstance(v, Tensor)))

    monkeypatch.setattr(SegmentRunner, "_execute", watched_execute)
    monkeypatch.setattr(SegmentRunner, "advance", watched_advance)
    run = quantized(canonical(redraw(Encoder(3)), x), Recipe(wbits=4, abits=4), batches(x, 2))
    assert len(advanced) == 2 * (run.result.segments - 1) >= 10
    stream = 4 * 6 * 16
    assert max(advanced) <= 7 * stream and min(advanced) <= stream


def test_runner_equals_the_graph(vit_graph) -> None:
    """Cut anywhere: running in two pieces gives what the whole gives, bit for bit."""
    graph_module, x = vit_graph(), images()
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    result = next(n for n in graph_module.graph.nodes if n.op == "output").all_input_nodes[0]
    for position in range(1, len(nodes), 7):
        runner = SegmentRunner(graph_module, [(part,) for part in x.split(3)])
        runner.advance(nodes[0], nodes[position])
        found = torch.cat([values[result] for values in runner.run(nodes[position], None, [result])])
        torch.testing.assert_close(found, output(graph_module, x), rtol=1e-5, atol=1e-5)


def test_deterministic(vit_graph) -> None:
    first, second = (quantized(vit_graph(), Recipe(wbits=4, abits=4), batches(images())) for _ in range(2))
    assert len(first.weights) == 10
    for a, b in zip(first.weights.values(), second.weights.values()):
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    assert torch.equal(output(first.graph_module, images()), output(second.graph_module, images()))


def test_the_float_graph_is_left_alone(encoder_graph) -> None:
    graph_module = encoder_graph()
    before = {k: v.clone() for k, v in graph_module.state_dict().items()}
    quantized(graph_module, Recipe(wbits=2, abits=2), batches(sequences()))
    assert graph_module.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in graph_module.state_dict().items())


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.exp(40 * self.first(x)).sqrt())


@pytest.mark.parametrize("value", [100.0, math.nan])
def test_activations_that_are_not_finite_are_named(value: float) -> None:
    graph_module = canonical(redraw(Exploding()), 0.1 * sequences())
    bad = 0.1 * sequences()
    bad[5] *= value
    name = "second/input" if value == 100.0 else "first/input"
    with pytest.raises(CalibrationError, match=f"activation at {name} is not finite"):
        quantized(graph_module, Recipe(activations="minmax"), batches(bad))


def test_no_data(encoder_graph) -> None:
    from repquant_fx.passes.match_sites import Plan

    with pytest.raises(CalibrationError, match="no calibration data"):
        quantize_sequentially(encoder_graph(), Plan(), [], Recipe())


@pytest.mark.parametrize("which", ["wbits", "abits", "both"])
def test_more_bits_are_better(encoder_graph, which: str) -> None:
    x, found = sequences(64), []
    for bits in range(2, 9):
        wbits, abits = (bits if which != "abits" else 8), (bits if which != "wbits" else 8)
        # the logarithmic Softmax has a floor that bits do not lower
        recipe = Recipe(wbits=wbits, abits=abits, softmax="uniform", clipping="none", correction=False)
        found.append(quality(quantized(encoder_graph(), recipe, batches(x)), x))
    assert all(math.isfinite(q) for q in found)
    assert all(more > fewer - 0.5 for fewer, more in itertools.pairwise(found)), found
    assert found[-1] > found[0] + 18 and found[-1] > 30


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width_with_the_defaults(encoder_graph, bits: int) -> None:
    x = sequences()
    run = quantized(encoder_graph(), Recipe(wbits=bits, abits=bits, input_bits=bits), batches(x))
    assert quality(run, x) > {2: 4, 3: 11}.get(bits, 17)


SWITCHES = [
    {"norm": "layerwise"},
    {"norm": "channelwise"},
    {"softmax": "log2"},
    {"softmax": "uniform"},
    {"softmax_scale": "percentile"},
    {"clipping": "adam"},
    {"clipping": "none"},
    {"activations": "percentile"},
    {"activations": "minmax"},
    {"weights": "minmax"},
    {"correction": False},
    {"gptq": False},
    {"gptq": False, "correction": False},
    {"gptq_activation_order": False},
    {"gptq_damping": 0.1},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_every_switch(encoder_graph, changes: dict[str, object]) -> None:
    x = sequences()
    bits = 3 if "softmax_scale" in changes else 6  # with more bits both ways find the same scale for this model
    run = quantized(encoder_graph(), Recipe(wbits=bits, abits=bits, **changes), batches(x))  # type: ignore[arg-type]
    default = quantized(encoder_graph(), Recipe(wbits=bits, abits=bits), batches(x))
    assert bool(torch.isfinite(output(run.graph_module, x)).all())
    assert quality(run, x) > (8 if bits == 3 else 15)
    assert not torch.equal(output(run.graph_module, x), output(default.graph_module, x)), "the switch does nothing"


def test_the_block_size_of_gptq_changes_nothing_but_rounding(encoder_graph) -> None:
    x = sequences()
    first, second = (quantized(encoder_graph(), Recipe(4, 8, gptq_block=b), batches(x)).graph_module for b in (3, 128))
    assert sqnr(output(first, x), output(second, x)) > 30


def test_channelwise_and_reparameterized_are_two_forms_of_one_quantizer(encoder_graph) -> None:
    """At 8-bit weights their outputs differ less than a layerwise quantizer's differs from either."""
    x, outputs = sequences(64), {}
    for norm in ("channelwise", "reparameterize", "layerwise"):
        recipe = Recipe(wbits=8, abits=4, norm=norm, correction=False)
        outputs[norm] = quantized(encoder_graph(), recipe, batches(x)).graph_module
    close = sqnr(output(outputs["reparameterize"], x), output(outputs["channelwise"], x))
    far = sqnr(output(outputs["layerwise"], x), output(outputs["channelwise"], x))
    assert close > far + 2.5


def test_repquant_is_better_than_its_predecessor() -> None:
    """On a model with outlier channels, at four bits, on data that neither was calibrated with."""
    gains = []
    for seed in (0, 1):
        model = vit(2, seed)
        for index, block in enumerate(model.blocks):
            plant(block.norm1, [block.attn.qkv], 30.0, 2 * index)
            plant(block.norm2, [block.mlp.fc1], 30.0, 2 * index + 1)
        graph_module, fresh = canonical(model, images()), images(32, seed=99)
        found = {
            name: quality(quantized(graph_module, preset(4, 4), batches(images(32))), fresh)
            for name, preset in PRESETS.items()
        }
        layerwise = quality(quantized(graph_module, Recipe(4, 4, norm="layerwise"), batches(images(32))), fresh)
        assert found["repquant"] > found["repq-vit"] and found["repquant"] > layerwise
        gains.append(found["repquant"] - found["repq-vit"])
    assert sum(gains) / len(gains) > 1.0, gains


def test_uneven_batches_and_a_batch_of_one(encoder_graph) -> None:
    x = sequences(11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = quantized(encoder_graph(), Recipe(), [x[:6], x[6:10], x[10:]])
        single = quantized(encoder_graph(), Recipe(), [x[:1]])
    assert quality(run, x) > 20 and math.isfinite(quality(single, x))
