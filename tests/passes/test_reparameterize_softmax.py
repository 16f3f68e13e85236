"""Reparameterize softmax: log-sqrt2 and its shift form give the same values; masked tokens stay exactly zero."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Encoder,
    aten,
    calibrate,
    canonical,
    match,
    observed,
    output,
    quantized,
    redraw,
    sequences,
    values_at,
)
from torch import Tensor, nn

from repquant_fx import ops  # noqa: F401 - registers the operators
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.reparameterize_softmax import ReparameterizeSoftmax
from repquant_fx.passes.slots import slot_module, slot_of
from repquant_fx.quantizers.observers import LogQuantizer, ShiftLogQuantizer
from repquant_fx.recipe import Recipe

log2_softmax = torch.ops.repquant_fx.log2_softmax.default
log2_quantize = torch.ops.repquant_fx.log2_quantize.default


@pytest.mark.parametrize("bits", range(2, 9))
def test_same_values_in_the_graph(encoder_graph, bits: int) -> None:
    graph_module, recipe = encoder_graph(), Recipe(abits=bits, softmax="log_sqrt2")
    plan = observed(graph_module, [sequences()], recipe)
    group = next(g for g in plan.groups if g.softmax is not None)
    calibrate(graph_module, recipe, group)
    slot = slot_of(graph_module, group.sites[0])
    (before,) = values_at(graph_module, [slot], sequences())
    assert ReparameterizeSoftmax(group)(graph_module).modified
    assert isinstance(slot_module(graph_module, group.sites[0]), ShiftLogQuantizer)
    (after,) = values_at(graph_module, [slot], sequences())
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    assert len(after.unique()) <= 1 << bits


def test_log2_and_uniform_have_nothing_to_reparameterize(encoder_graph) -> None:
    for softmax in ("log2", "uniform"):
        graph_module, recipe = encoder_graph(), Recipe(softmax=softmax)
        plan = observed(graph_module, [sequences()], recipe)
        calibrate(graph_module, recipe, *plan.groups)
        assert not any(ReparameterizeSoftmax(g)(graph_module).modified for g in plan.groups)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_operators_equal_the_quantizer_and_keep_zeros(bits: int, steps: int) -> None:
    logits = 3 * torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(bits))
    hidden = torch.rand(4, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    hidden[..., 0] = False
    logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    scale = torch.tensor(0.9)
    whole, parts = log2_softmax(logits, scale, -1, bits, steps), log2_quantize(logits.softmax(-1), scale, bits, steps)
    assert bool((whole[hidden] == 0).all()) and bool((parts[hidden] == 0).all())
    assert float((whole != parts).double().mean()) < 0.01  # log of softmax and log-softmax round apart at ties only
    assert torch.equal(parts, LogQuantizer(0.9, bits, steps)(logits.softmax(-1)))
    assert float(whole.max()) > 0


def test_a_row_that_is_hidden_whole_stays_finite() -> None:
    logits = torch.full((1, 2, 4), torch.finfo(torch.float32).min)
    assert bool(torch.isfinite(log2_softmax(logits, torch.tensor(1.0), -1, 4, 2)).all())


@pytest.mark.parametrize("softmax", ["log_sqrt2", "log2"])
@pytest.mark.parametrize("lower", [False, True])
def test_causal_attention_does_not_look_ahead(softmax: str, lower: bool) -> None:
    class Last(nn.Module):
        """All tokens of one causal block: token t may depend on tokens up to t alone."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder(causal=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder.blocks(self.encoder.embed(x))

    x = sequences()
    run = quantized(canonical(redraw(Last()), x), Recipe(wbits=4, abits=4, softmax=softmax), list(x.split(8)))
    if lower:
        run_passes(run.graph_module, [LowerToQDQ(run.plan, run.weights)])
    changed = x.clone()
    changed[:, 3:] += torch.randn(changed[:, 3:].shape, generator=torch.Generator().manual_seed(5))
    first, second = output(run.graph_module, x), output(run.graph_module, changed)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3:], second[:, 3:])
    softmaxes = [n for n in run.graph_module.graph.nodes if n.target in (log2_softmax if lower else aten.softmax.int,)]
    assert len(softmaxes) == 1


def test_a_softmax_with_another_reader_is_quantized_for_the_product_alone() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).chunk(3, -1)
            a = (q @ k.transpose(1, 2)).softmax(-1)
            return a @ v, a

    x = sequences()
    run = quantized(canonical(redraw(Shown()), x), Recipe(), list(x.split(8)))
    run_passes(run.graph_module, [LowerToQDQ(run.plan, run.weights)])
    targets = [n.target for n in run.graph_module.graph.nodes]
    assert log2_quantize in targets and log2_softmax not in targets and aten.softmax.int in targets
    shown = run.graph_module(x)[1]
    torch.testing.assert_close(shown.sum(-1), torch.ones(32, 6))


def test_matched_sites_are_few(encoder_graph) -> None:
    assert sum(s.role == "softmax" for g in match(encoder_graph()).groups for s in g.sites) == 1
