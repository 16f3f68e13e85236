"""Fuse RMS norms: every spelling becomes one operator with the same values, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from helpers import Function, aten, canonical, count, match, output, redraw
from torch import Tensor, nn

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
W = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5


def root(x: Tensor, dim: int = -1) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-5)


SPELLINGS = {
    "weight first": lambda x: W * (x * root(x)),
    "weight last": lambda x: (x * root(x)) * W,
    "root first": lambda x: W * (root(x) * x),
    "product": lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * W,
    "square": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * W,
    "division": lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * W,
    "power": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5) * W,
    "reciprocal": lambda x: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) * W,
    "plus one": lambda x: x * root(x) * (1.0 + (W - 1)),
    "casts": lambda x: (W * (x.float() * root(x.float())).to(torch.float32)).type_as(x),
    "positive axis": lambda x: W * (x * root(x, 2)),
    "no weight": lambda x: x * root(x),
}
OTHERS = {
    "other axis": lambda x: x * root(x, 1),
    "another tensor's root": lambda x: x * root(x + 1),
    "cube": lambda x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5),
    "sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
    "no epsilon": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "no keepdim": lambda x: x.transpose(1, 2) * torch.rsqrt(x.pow(2).mean(-1) + 1e-5)[:, None],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    graph_module = canonical(Function(SPELLINGS[name]), X)
    assert count(graph_module, aten.rms_norm.default) == 1
    (norm,) = (n for n in graph_module.graph.nodes if n.target is aten.rms_norm.default)
    assert (norm.args[2] is None) is (name == "no weight") and norm.args[3] == 1e-5
    assert sum(n.op == "call_function" for n in graph_module.graph.nodes) == 1
    torch.testing.assert_close(output(graph_module, X), SPELLINGS[name](X), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_other_computations_are_left_alone(name: str) -> None:
    graph_module = canonical(Function(OTHERS[name]), X)
    assert count(graph_module, aten.rms_norm.default) == 0
    torch.testing.assert_close(output(graph_module, X), OTHERS[name](X))


def test_a_weight_that_is_not_per_channel_stays_outside() -> None:
    wide = torch.rand(6, 8)
    graph_module = canonical(Function(lambda x: x * root(x) * wide), X)
    (norm,) = (n for n in graph_module.graph.nodes if n.target is aten.rms_norm.default)
    assert norm.args[2] is None and count(graph_module, aten.mul.Tensor) == 1


def test_a_norm_that_is_read_twice_before_its_weight() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * root(x)
        return h * W + h

    graph_module = canonical(Function(function), X)
    (norm,) = (n for n in graph_module.graph.nodes if n.target is aten.rms_norm.default)
    assert norm.args[2] is None and len(norm.users) == 2
    torch.testing.assert_close(output(graph_module, X), function(X))


def test_a_written_out_norm_is_matched_with_its_linears() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.a, self.b = (
                nn.Parameter(torch.ones(8)),
                nn.Linear(8, 4, bias=False),
                nn.Linear(8, 4, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.weight * (x * root(x))
            return self.a(h) * self.b(h)

    plan = match(canonical(redraw(Written()), X))
    (group,) = plan.groups
    assert group.kind == "norm_linear" and len(group.consumers) == 2 and not group.shared_norm
