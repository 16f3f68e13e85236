"""The estimate against the truth: each activation and weight quantized alone, and the whole model run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Encoder, PostNorm, images, redraw, sequences, swin, vit
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from repquant_fx import Recipe
from repquant_fx.options import Calibration, Source
from repquant_fx.passes.base import attribute, run_passes
from repquant_fx.passes.channel_flow import hint
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.slots import slot_of
from repquant_fx.preparation import prepare
from repquant_fx.sensitivity.candidates import activation_quantizers, observe, rounded_weights, valid
from repquant_fx.sensitivity.estimate import Estimate, estimate

PLAIN = {"equalize": (), "correction": False}
BITS = (2, 4, 6)


class Laboratory:
    """A prepared model, its errors at 2, 4 and 6 bits, their estimate, and the truth on demand."""

    def __init__(
        self, model: nn.Module, data: Tensor, recipe: Recipe, *, loss: str = "error", probes: int = 16
    ) -> None:
        prepared = prepare(Source(model, example_inputs=(data[:2],)), Calibration(data, batch_size=16), recipe)
        self.graph, self.plan, self.loss = prepared.graph_module, prepared.plan, loss
        self.batches = list(prepared.data.batches)
        run_passes(self.graph, [InsertObservers(self.plan, len(self.batches))])
        self.observed = observe(self.graph, self.plan, self.batches, None)
        self.quantizers, self.weights = {}, {}
        sites = [s for g in self.plan.groups for s in g.sites]
        choices = {s.name: BITS for s in sites}
        for group in self.plan.groups:
            self.quantizers.update(activation_quantizers(self.graph, group, choices, recipe))
            for site in group.sites if group.kind != "matmul" else ():
                self.weights.update(
                    rounded_weights(
                        self.graph,
                        group,
                        site,
                        self.quantizers[site.name][4],
                        dict.fromkeys(site.consumers, BITS),
                        self.observed.moments.get(site.name),
                        recipe,
                    )
                )
        self.sites = {s.name: s for s in sites}
        self.estimate: Estimate = estimate(
            self.graph,
            self.plan,
            self.batches,
            self.quantizers,
            self.weights,
            self.observed,
            loss=loss,
            probes=probes,
            seed=0,
        )

    @torch.no_grad()
    def truth(self, *, site: str | list[str] = [], consumer: Node | list[Node] = [], bits: int) -> float:  # noqa: B006
        """The loss with one or several things quantized."""
        changed: dict[Node, object] = {}
        graph: GraphModule = self.graph
        for name in [site] if isinstance(site, str) else site:
            changed[slot_of(graph, self.sites[name])] = self.quantizers[name][bits]
        for node in [consumer] if isinstance(consumer, Node) else consumer:
            changed[node] = self.weights[node][bits].error(attribute(graph, node.args[1]))  # type: ignore[arg-type]

        class Altered(Interpreter):
            def run_node(self, n: Node) -> object:
                value = super().run_node(n)
                if n in changed and n.op == "call_module":
                    return changed[n](value)  # type: ignore[operator]
                if n in changed:
                    difference, shift = changed[n]  # type: ignore[misc]
                    x = self.env[n.args[0]]
                    return value + n.target(x, difference, shift, *n.args[3:])  # type: ignore[operator]
                return value

        noise = signal = divergence = rows = 0.0
        for batch in self.batches:
            expected, found = (
                _first(Interpreter(graph).run(*batch)),
                _first(Altered(graph, garbage_collect_values=False).run(*batch)),
            )
            noise += float((found - expected).double().square().sum())
            signal += float(expected.double().square().sum())
            p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            rows += expected.numel() / expected.shape[-1]
        return divergence / rows if self.loss == "kl" else noise / signal

    def pairs(self, bits: tuple[int, ...] = BITS) -> tuple[np.ndarray, np.ndarray]:
        """(estimated, true) of every activation and weight."""
        found = [
            (self.estimate.activations[n][b].damage, self.truth(site=n, bits=b)) for n in self.quantizers for b in bits
        ]
        found += [
            (self.estimate.weights[c][b].damage, self.truth(consumer=c, bits=b)) for c in self.weights for b in bits
        ]
        return np.array([e for e, _ in found]), np.array([t for _, t in found])


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result  # type: ignore[return-value]


MODELS = {
    "vit": (vit, images),
    "swin": (swin, images),
    "encoder": (lambda: redraw(Encoder(depth=2)), sequences),
    "causal, RMS": (lambda: redraw(Encoder(depth=2, norm="rms", causal=True)), sequences),
    "post-norm": (lambda: redraw(PostNorm()), sequences),
}


# the truth takes long: each model with one of the losses, the rest for whoever asks for slow tests
CASES = [
    pytest.param(name, loss, marks=pytest.mark.slow if loss != ("error", "kl")[index % 2] else ())
    for index, name in enumerate(MODELS)
    for loss in ("error", "kl")
]


@pytest.mark.parametrize("name, loss", CASES)
def test_ranks_as_brute_force(name: str, loss: str) -> None:
    """At equal bits and over all bits; and the damage is right, not the order alone."""
    make, data = MODELS[name]
    estimated, true = Laboratory(make(), data(64), Recipe(wbits=4, abits=4, **PLAIN), loss=loss).pairs()
    assert len(true) >= 3 * 6
    for index in range(len(BITS)):
        assert spearmanr(estimated[index::len(BITS)], true[index::len(BITS)]).statistic > 0.97
    assert spearmanr(estimated, true).statistic > 0.995
    factor = np.abs(np.log(estimated / true))
    assert np.median(factor) < 0.15 and factor.max() < 1.0


def test_errors_of_all_layers_add_up() -> None:
    """The sum over layers predicts the model with everything quantized, within 1.5 dB at 6 bits."""
    laboratory = Laboratory(vit(), images(64), Recipe(wbits=6, abits=6, input_bits=6, **PLAIN))
    parts = [*laboratory.estimate.activations.values(), *laboratory.estimate.weights.values()]
    predicted = sum(part[6].damage for part in parts)
    true = laboratory.truth(site=list(laboratory.quantizers), consumer=list(laboratory.weights), bits=6)
    assert abs(10 * np.log10(predicted / true)) < 1.5


def test_probes_and_samples_average_the_same() -> None:
    """Each sample on its own, or a batch taken for one sample: the same in the mean."""
    laboratory = Laboratory(vit(depth=1), images(64), Recipe(**PLAIN), probes=64)
    for node in laboratory.graph.graph.nodes:  # forget which dimension is the batch
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = torch.empty([int(hint(d)) for d in value.shape], device="meta")
    blind = estimate(
        laboratory.graph,
        laboratory.plan,
        laboratory.batches,
        laboratory.quantizers,
        laboratory.weights,
        laboratory.observed,
        loss="error",
        probes=64,
        seed=1,
    )
    for name, tried in blind.activations.items():
        assert tried[4].damage == pytest.approx(laboratory.estimate.activations[name][4].damage, rel=0.6)
    ratios = [
        tried[b].damage / laboratory.estimate.weights[c][b].damage for c, tried in blind.weights.items() for b in BITS
    ]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0, abs=0.15)


def test_padded_tokens_do_not_count() -> None:
    """Of a sentence encoder the outputs at padded tokens are nobody's business."""
    output = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert (valid(output, mask).expand(output.shape) == mask[..., None]).all()
    # no tokens in the output: all count
    assert valid(output, None).item() == 1 and valid(torch.randn(2, 5), mask).item() == 1


def test_a_residual_beside_a_slot_carries_no_gradient_of_it() -> None:
    """Post-norm: the norm's output is read by a Linear, quantized, and by the residual, which is not."""
    laboratory = Laboratory(redraw(PostNorm()), sequences(64), Recipe(**PLAIN), probes=64)
    name = next(n for n in laboratory.quantizers if n.startswith("fc1"))
    assert laboratory.estimate.activations[name][4].damage == pytest.approx(
        laboratory.truth(site=name, bits=4), rel=0.2
    )
