"""Normalize rows: quantized probabilities sum to one before their product, and rows that are all zero stay so."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled, inputs
from helpers import aten, calibrate, count, observed, output, sequences, values_at
from torch import Tensor

from repquant_fx import repq_vit
from repquant_fx.decision import Decision
from repquant_fx.passes.normalize_rows import NormalizeRows, may_normalize
from repquant_fx.passes.slots import install, slot_of
from repquant_fx.quantizers.activation import softmax_quantizer
from repquant_fx.quantizers.logarithmic import fake_quantize, normalized
from repquant_fx.quantizers.observers import LogQuantizer
from repquant_fx.recipe import Recipe

TARGETS = aten.sum.dim_IntList, aten.div.Tensor


def attention(encoder_graph, recipe: Recipe):
    graph_module = encoder_graph()
    plan = observed(graph_module, [sequences()], recipe)
    group = next(g for g in plan.groups if g.softmax is not None)
    calibrate(graph_module, recipe, group)
    return graph_module, group


def test_rows_sum_to_one_in_the_graph(encoder_graph) -> None:
    graph_module, group = attention(encoder_graph, Recipe(abits=3))
    site = group.sites[0]
    install(graph_module, site, LogQuantizer(1.0, 3, 1, normalized=True))
    before = count(graph_module, *TARGETS)
    assert may_normalize(site) and NormalizeRows(group)(graph_module).modified
    assert count(graph_module, *TARGETS) == before + 2
    (product,) = site.consumers
    slot, rows = values_at(graph_module, [slot_of(graph_module, site), product.args[0]], sequences())
    assert not torch.allclose(slot.sum(-1), torch.ones(()), atol=1e-3)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    torch.testing.assert_close(rows, normalized(slot))
    install(graph_module, site, LogQuantizer(2.0**-40, 2, 1, normalized=True))  # every code saturates at the largest
    assert torch.isfinite(output(graph_module, sequences())).all()


def test_only_where_the_quantizer_was_chosen_for_it(encoder_graph) -> None:
    for recipe in (Recipe(abits=8), Recipe(abits=3, normalize_rows=False), repq_vit(3, 3)):
        graph_module, group = attention(encoder_graph, recipe)
        assert not NormalizeRows(group)(graph_module).modified


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(normalized(torch.tensor([[0.0, 0.0], [1.0, 3.0]])), torch.tensor([[0.0, 0.0], [0.25, 0.75]]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_chosen_where_the_product_has_less_error(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    p = torch.softmax(2 * torch.randn(4, 16, 16, generator=generator), -1)
    common = torch.randn(1, 1, 8, generator=generator).expand(4, 16, 8)  # rows average to it whatever they are

    def error(values: Tensor, quantizer: LogQuantizer) -> float:
        rows = fake_quantize(p, float(quantizer.scale), bits, quantizer.steps)
        return float(((normalized(rows) if quantizer.normalized else rows) @ values - p @ values).square().mean())

    chosen = [softmax_quantizer(p, 1.0, bits, "log", lambda rows: rows @ common, normalize=n) for n in (False, True)]
    assert [quantizer.normalized for quantizer in chosen] == [False, True]
    assert error(common, chosen[1]) < 1e-9 < error(common, chosen[0])
    other = torch.randn(4, 16, 8, generator=generator)
    both = [softmax_quantizer(p, 1.0, bits, "log", lambda rows: rows @ other, normalize=n) for n in (False, True)]
    assert error(other, both[1]) <= error(other, both[0])


def test_the_decision_is_kept(encoder_graph) -> None:
    _, group = attention(encoder_graph, Recipe(abits=4))
    quantizers = {site.name: LogQuantizer(0.5, 4, 2, normalized=True) for site in group.sites[:1]}
    quantizers |= {site.name: LogQuantizer(0.5, 4, 2) for site in group.sites[1:]}
    again = Decision.from_tensors(group, Decision(quantizers).to_tensors(group)).quantizers
    assert [q.normalized for q in again.values()] == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("container", ["int8", "int4"])
def test_the_file_divides_and_agrees_with_the_reference(container: str) -> None:
    plain, made = (compiled("vit", 8, 3, container=container, normalize_rows=rows, softmax_scale="output")
                   for rows in (False, True))
    divided = [s for layer in made.report["layers"] for s in layer["inputs"] if "divided" in s.get("quantizer", "")]
    operators, before = ([node.op_type for node in each.proto.graph.node] for each in (made, plain))
    assert divided and operators.count("ReduceSum") == before.count("ReduceSum") + len(divided)
    assert made.parity is not None and not made.parity.problems()
    (found,) = made.session().run(None, {made.proto.graph.input[0].name: inputs("vit", 4, seed=9).numpy()})
    assert torch.isfinite(torch.from_numpy(found)).all()
