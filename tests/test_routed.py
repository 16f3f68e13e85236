"""Mixtures of experts: each expert's weight is rounded for its own tokens, and one that no token reached is named."""

from __future__ import annotations

import functools

import torch
from compiled import PLAIN
from helpers import Function, canonical, match, redraw
from torch import Tensor, nn

from repquant_fx import CompiledModel, Recipe, compile
from repquant_fx.passes.match_sites import Plan
from repquant_fx.pipeline.routed import parts, rows_of
from repquant_fx.report import summary

EXPERTS = 3
X = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Tokens go to the first or the second of three experts, by the sign of a channel; the third one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.zeros(EXPERTS, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).reshape(-1, 8)
        which, order = torch.sort((x.reshape(-1, 8)[:, 0] > 0).to(torch.int64), stable=True)
        ends = torch.stack([(which <= expert).sum() for expert in range(EXPERTS)]).to(torch.int32)
        given = torch.ops.transformers.grouped_mm_fallback(rows[order], self.weight, ends)
        return self.head(torch.zeros_like(rows).index_copy(0, order, given).reshape(x.shape) + x)


@functools.cache
def compiled(gptq: bool = True) -> CompiledModel:
    from transformers.integrations import moe  # noqa: F401 - registers the operator

    recipe = Recipe(**{**PLAIN, "wbits": 4, "gptq": gptq})
    return compile(redraw(Mixture()), X, recipe, example_inputs=(X[:2],), batch_size=4)


def test_an_expert_that_no_token_reached_is_named() -> None:
    entries = [entry for entry in compiled().report["layers"] if "weight" in entry]
    assert [entry["weight"]["method"] for entry in entries] == ["GPTQ", "GPTQ", "round to nearest", "GPTQ"]
    notes = [entry.get("notes", []) for entry in entries]
    assert [len(each) for each in notes] == [0, 0, 1, 0] and "no token of the calibration data reached" in notes[2][0]
    assert summary(compiled().report).count("reached this expert") == 1
    assert compiled().report["parity"]["agrees"]


def test_its_weights_are_those_to_nearest() -> None:
    tensors = [{t.name: t.raw_data for t in compiled(gptq).proto.graph.initializer if "weight" in t.name
                and t.name.endswith("_quantized")} for gptq in (True, False)]
    assert tensors[0].keys() == tensors[1].keys()
    experts = sorted(name for name in tensors[0] if "head" not in name)
    assert len(experts) == EXPERTS
    assert sum(tensors[0][name] == tensors[1][name] for name in experts) == 1


def test_rows_that_are_kept() -> None:
    """Two layers share all rows, each of two others has rows of its own."""
    a, b, c = (torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))

    def model(x: Tensor) -> Tensor:
        rows = x * 2
        mine = rows[:, :1] > 0
        routed = torch.where(mine, rows @ a.T, rows @ b.T)
        return routed + torch.where(~mine, rows @ c.T, rows @ c.T * 2)

    plan: Plan = match(canonical(Function(model), torch.randn(4, 8)))
    (group,) = plan.groups
    found = parts(group.sites[0])
    assert [(len(part.consumers), part.kept is not None) for part in found] == [(2, False), (1, True), (1, True)]
    assert len({part.key for part in found}) == 3 and found[0].key == group.sites[0].name


def test_of_rows_those_that_count_and_are_kept() -> None:
    rows, counted, kept = torch.arange(4.0)[:, None], torch.tensor([1, 1, 0, 1]) > 0, torch.tensor([[0], [1], [1], [1]])
    assert rows_of(rows, counted, kept > 0).flatten().tolist() == [1, 3]
    assert rows_of(rows, None, kept > 0).flatten().tolist() == [1, 2, 3]
    assert rows_of(rows, counted, None).flatten().tolist() == [0, 1, 3]
