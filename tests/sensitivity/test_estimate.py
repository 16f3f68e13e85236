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
from repquant_fx.compiler import prepare
from repquant_fx.passes.base import attribute, run_passes
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.sensitivity.candidates import activation_quantizers, observe, rounded_weights
from repquant_fx.sensitivity.estimate import Estimate, estimate

PLAIN = {"absorb": (), "correction": False}
BITS = (2, 4, 6)


class Laboratory:
    """A prepared model, its errors at 2, 4 and 6 bits, their estimate, and the truth on demand."""

    def __init__(self, model: nn.Module, data: Tensor, recipe: Recipe, *, loss: str = "error", probes: int = 16) -> None:
        prepared = prepare(model, recipe, calibration=data, batch_size=16, example_inputs=(data[:2],))
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
                self.weights.update(rounded_weights(self.graph, group, site, self.quantizers[site.name][4], dict.fromkeys(site.consumers, BITS),
                                                    self.observed.moments.get(site.name), recipe))
        self.sites = {s.name: s for s in sites}
        self.estimate: Estimate = estimate(self.graph, self.plan, self.batches, self.quantizers, self.weights, self.observed, loss=loss,
                                           probes=probes, seed=0)

    @torch.no_grad()
    def truth(self, *, site: str | None = None, consumer: Node | None = None, bits: int) -> float:
        """The loss with one thing quantized."""
        changed: dict[Node, object] = {}
        graph: GraphModule = self.graph
        if site is not None:
            assert self.sites[site].slot is not None
            changed[self.sites[site].slot] = self.quantizers[site][bits]  # type: ignore[index]
        if consumer is not None:
            weight = attribute(graph, consumer.args[1])  # type: ignore[arg-type]
            changed[consumer] = self.weights[consumer][bits].error(weight)

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
            expected, found = (_first(Interpreter(graph).run(*batch)), _first(Altered(graph, garbage_collect_values=False).run(*batch)))
            noise += float((found - expected).double().square().sum())
            signal += float(expected.double().square().sum())
            p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            rows += expected.numel() / expected.shape[-1]
        return divergence / rows if self.loss == "kl" else noise / signal

    def pairs(self, bits: tuple[int, ...] = BITS) -> tuple[np.ndarray, np.ndarray]:
        """(estimated, true) of every activation and weight."""
        found = [(self.estimate.activations[n][b].damage, self.truth(site=n, bits=b)) for n in self.quantizers for b in bits]
        found += [(self.estimate.weights[c][b].damage, self.truth(consumer=c, bits=b)) for c in self.weights for b in bits]
        return np.array([e for e, _ in found]), np.array([t for _, t in found])


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result  # type: ignore[return-value]


MODELS = {"vit": (vit, images), "swin": (swin, images), "encoder": (lambda: redraw(Encoder(depth=2)), sequences),
          "causal, RMS": (lambda: redraw(Encoder(depth=2, norm="rms", causal=True)), sequences), "post-norm": (lambda: redraw(PostNorm()), sequences)}


@pytest.mark.parametrize("loss", ["error", "kl"])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_as_brute_force(name: str, loss: str) -> None:
    """Over all sites and weights at equal bits, and over all bits; and the size is right, not the order alone."""
    make, data = MODELS[name]
    estimated, true = Laboratory(make(), data(64), Recipe(wbits=4, abits=4, **PLAIN), loss=loss).pairs()
    for index, bits in enumerate(BITS):
        rank = spearmanr(estimated[index::len(BITS)], true[index::len(BITS)]).statistic
        print(name, loss, bits, len(true) // 3, rank, np.median(np.abs(np.log(estimated[index::3] / true[index::3]))))
    print(spearmanr(estimated, true).statistic)
