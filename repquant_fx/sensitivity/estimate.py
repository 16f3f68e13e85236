"""What the error of one activation or weight does to the model's output, to second order and without running the model
for it.

Let an error `d` at some value inside the model change the output by `J d` (J the Jacobian). Two losses, both zero at
the float model:

- `error`: noise power over signal power of the output, `|J d|^2 / |y|^2`, so that -10 log10 of it is an SQNR in dB;
- `kl`: divergence of the predicted distributions, `1/2 d^T J^T (diag(p) - p p^T) J d` nats per prediction, for outputs
  that are logits.

Both are `E[(v^T J d)^2]` for a random `v` with the right covariance (Hutchinson), and `J^T v` at all values of the
model at once is one backward pass: `g`. So the damage of every error of every layer is the mean of `(g . d)^2` over
samples and probes. Errors of different samples do not mix, as their `v` are independent; the sum over the tokens of a
sample comes before the square, since errors of one weight add up coherently over tokens.

The published relatives use the labels' gradient (empirical Fisher) or the trace of a Hessian (HAWQ, arXiv 1905.03696
and 1911.03852); neither is needed where the float model's own output is the target, and the direction of the error is
known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.errors import InputError
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.passes.base import attribute
from repquant_fx.passes.match_sites import Plan
from repquant_fx.passes.slots import slot_of
from repquant_fx.pipeline.padding import Padding
from repquant_fx.progress import progress
from repquant_fx.quantizers.counted import counted_values
from repquant_fx.recorder import Recorder
from repquant_fx.sensitivity.candidates import Observed, RoundedWeight, valid

LOSSES = ("error", "kl")


@dataclass
class Tally:
    """Sums for one value with so many bits: damage to the output, noise and signal at the value itself."""

    damage: float = 0.0
    noise: float = 0.0
    signal: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.damage + other.damage, self.noise + other.noise, self.signal + other.signal)

    @property
    def sqnr_db(self) -> float:
        """SQNR of the value itself, dB."""
        return 10 * math.log10(self.signal / self.noise) if self.noise > 0 and self.signal > 0 else math.inf


@dataclass
class Estimate:
    """Tallies by bits, of activations by site name and of weights by the node that reads them."""

    activations: dict[str, dict[int, Tally]] = field(default_factory=dict)
    weights: dict[Node, dict[int, Tally]] = field(default_factory=dict)


def estimate(
    graph_module: GraphModule,
    plan: Plan,
    batches: Sequence[tuple[Tensor, ...]],
    quantizers: Mapping[str, Mapping[int, nn.Module]],
    weights: Mapping[Node, Mapping[int, RoundedWeight]],
    observed: Observed,
    *,
    loss: str,
    probes: int,
    seed: int,
    mask_index: int | None = None,
    padding: Padding | None = None,
) -> Estimate:
    """One forward and `probes` backward passes of the float graph per batch.

    Long because the hooks of its one pass share what they collect.

    Args:
        graph_module: with observers (that no longer record) in the slots.
        quantizers, weights: what to try, by site name or consumer, and bits.
        loss: one of LOSSES.
        seed: of the random probes.
        mask_index: which input says what tokens are real, if one does.
        padding: what does not count of the values' own noise and signal.

    Raises:
        InputError: no output can be differentiated.
    """
    result = Estimate({name: {b: Tally() for b in tried} for name, tried in quantizers.items()},
                      {node: {b: Tally() for b in tried} for node, tried in weights.items()})
    slots = {slot_of(graph_module, site): site for group in plan.groups for site in group.sites}
    generator = torch.Generator().manual_seed(seed)
    padding = padding or Padding()
    for number, batch in enumerate(progress(batches, total=len(batches), description="estimate")):
        recorded: dict[Node, Tensor] = {}
        outputs = tensors_in(Recorder(graph_module, {*slots, *weights}, partial(_with_gradient, recorded)).run(*batch))
        nodes, values = list(recorded), list(recorded.values())
        gradients: dict[Node, list[Tensor]] = {node: [] for node in nodes}
        for probe in range(probes):
            pairs = [
                (o, c)
                for o, c in zip(
                    outputs,
                    _cotangents(outputs, observed, loss, generator, None if mask_index is None else batch[mask_index]),
                )
                if o.requires_grad
            ]
            if not pairs:
                raise InputError(
                    "no output of the model has a gradient (are they indices or flags?), so nothing can be said of "
                    "errors in it; "
                    "analyse a model that gives its logits or embeddings"
                )
            grads = torch.autograd.grad([o for o, _ in pairs], values, [c for _, c in pairs],
                                        retain_graph=probe + 1 < probes, allow_unused=True)
            for node, gradient in zip(nodes, grads):
                if gradient is not None:
                    gradients[node].append(gradient)
        counts = _batch_sizes(graph_module, batch)
        with torch.no_grad():
            for slot, site in slots.items():
                x = recorded[slot].detach()
                for bits, quantizer in quantizers.get(site.name, {}).items():
                    _add(
                        result.activations[site.name][bits],
                        quantizer(x) - x,
                        x,
                        gradients[slot],
                        _samples(site.value, counts),
                        probes,
                        padding.counts(number, site.value.name),
                    )
                for consumer in site.consumers:
                    y = recorded[consumer].detach() if consumer in weights else None
                    for bits, rounded in weights.get(consumer, {}).items():
                        assert y is not None and isinstance(consumer.args[1], Node)
                        difference, shift = rounded.error(attribute(graph_module, consumer.args[1]))
                        error = consumer.target(x, difference, shift, *consumer.args[3:])  # type: ignore[operator]
                        _add(
                            result.weights[consumer][bits],
                            error,
                            y,
                            gradients[consumer],
                            _samples(consumer, counts),
                            probes,
                            padding.counts(number, consumer.name),
                        )
    return result


def _with_gradient(recorded: dict[Node, Tensor], node: Node, value: Tensor) -> Tensor:
    """Keep a node's value, with a place of its own in the autograd graph."""
    # a slot gives its input back, which a residual may read too: a view has a gradient of its own
    recorded[node] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
    return recorded[node]


def _cotangents(
    outputs: Sequence[Tensor], observed: Observed, loss: str, generator: torch.Generator, mask: Tensor | None
) -> list[Tensor]:
    """A random v for each output, of its shape, with the covariance that makes E[(v^T J d)^2] the loss."""
    cotangents = []
    for output, power, rows in zip(outputs, observed.power, observed.rows):
        noise = torch.randn(output.shape, generator=generator)
        if not output.is_floating_point():
            cotangents.append(noise)
            continue
        noise = noise.to(output.dtype)
        if loss == "kl":
            p = torch.softmax(output.detach(), dim=-1)
            root = p.sqrt()
            v = (root * noise - p * (root * noise).sum(-1, keepdim=True)) / math.sqrt(2 * max(rows, 1.0))
        else:
            v = noise / math.sqrt(power) if power > 0 else torch.zeros_like(noise)
        cotangents.append(v * valid(output, mask))
    return cotangents


def _add(tally: Tally, error: Tensor, value: Tensor, gradients: Sequence[Tensor], samples: int, probes: int,
         counts: Tensor | None) -> None:
    tally.noise += float(counted_values(error, counts).double().square().sum())
    tally.signal += float(counted_values(value, counts).double().square().sum())
    for gradient in gradients:
        tally.damage += float((gradient * error).reshape(samples, -1).sum(1).double().square().sum()) / probes


def _batch_sizes(graph_module: GraphModule, batch: tuple[Tensor, ...]) -> dict[Any, int]:
    """The size in this batch of each symbol that stands for a batch dimension."""
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    symbols = [(_symbols(node), len(tensor)) for node, tensor in zip(placeholders, batch) if tensor.ndim]
    return {next(iter(s)): size for s, size in symbols if len(s) == 1}


def _samples(node: Node, counts: Mapping[Any, int]) -> int:
    """How many samples dimension 0 of a value holds, one after the other; 1 where it cannot be told.

    Taking several samples for one is right in the mean, as their probes are independent, and only noisier.
    """
    symbols = _symbols(node)
    return counts.get(next(iter(symbols)), 1) if len(symbols) == 1 else 1


def _symbols(node: Node) -> set[Any]:
    value = node.meta.get("val")
    size = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()
