"""Fold constants: fewer nodes, the same outputs, and names that people know."""

from __future__ import annotations

import pytest
import torch
from helpers import Function, aten, count, output, redraw
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.frontends.capture import capture
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.fold_constants import FoldConstants

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """A bias put together from parts, a weight plus one, a table looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.q, self.v = (
            nn.Parameter(torch.randn(12, 8)),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
        )
        self.gain, self.table = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(11, 12))
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6)[None, :] + 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q, torch.zeros_like(self.v), self.v])
        h = nn.functional.linear(x * (1 + self.gain), self.weight, bias)
        return h.transpose(1, 2) @ self.table[self.index.view(-1)].view(6, 6, -1).mean(-1)


def fold(model: nn.Module) -> tuple[GraphModule, bool]:
    graph_module = capture(model, [X]).graph_module
    result = FoldConstants()(graph_module)
    assert result is not None
    return graph_module, result.modified


def test_only_the_data_flows_afterwards() -> None:
    model = redraw(Parts())
    graph_module, modified = fold(model)
    assert modified and not FoldConstants()(graph_module).modified  # type: ignore[union-attr]
    kinds = {n.target for n in graph_module.graph.nodes if n.op == "call_function"}
    assert kinds == {aten.mul.Tensor, aten.linear.default, aten.transpose.int, aten.matmul.default}
    assert torch.equal(output(graph_module, X), output(model, X))
    names = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    assert {"weight", "gain"} < names and len(names) == 4 and "q" not in names
    assert torch.equal(graph_module.get_buffer("gain"), 1 + model.gain)


def test_several_results() -> None:
    table = torch.arange(12.0).reshape(6, 2)
    graph_module, modified = fold(
        Function(lambda x: x * table.sin().split(1, -1)[0] + table.cos().unbind(-1)[1][:, None])
    )
    assert modified and count(graph_module, aten.split.Tensor, aten.unbind.int) == 0
    first, second = table.sin()[:, :1], table.cos()[:, 1:]
    torch.testing.assert_close(output(graph_module, X), X * first + second)


def test_what_the_data_reaches_is_not_touched() -> None:
    model = redraw(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
    graph_module, modified = fold(model)
    assert not modified and torch.equal(output(graph_module, X), output(model, X))


def test_no_random_numbers_and_no_large_tensors_are_folded() -> None:
    graph_module, _ = fold(
        Function(lambda x: x + torch.zeros(1).expand(300, 300, 6, 8).sum((0, 1)) * torch.arange(8.0))
    )
    assert torch.equal(output(graph_module, X), X)
    big = torch.ones(8)
    graph_module, _ = fold(Function(lambda x: x[..., None, None] + big[:, None].expand(8, 100000)[:, :1, None]))
    assert max(t.numel() for t in graph_module.state_dict().values()) < 1 << 17

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(8)

    program = torch.export.export(Noise(), (X,))
    graph_module = program.module(check_guards=False)  # type: ignore[assignment]
    assert isinstance(graph_module, GraphModule)
    run_passes(graph_module, [FoldConstants()])
    assert count(graph_module, aten.rand.default) == 1


def test_a_parameter_with_other_readers_keeps_its_name() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + (1 + self.weight)

    model = Both()
    graph_module, modified = fold(model)
    assert modified and torch.equal(graph_module.get_parameter("weight"), model.weight)
    assert torch.equal(output(graph_module, X), output(model, X))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_biases_of_real_architectures_become_constants(name: str) -> None:
    import timm
    from helpers import match

    from repquant_fx.passes.normal_form import normalize

    small = (
        {"embed_dim": 16, "depths": (1,), "num_heads": (1,), "window_size": 4, "patch_size": 2}
        if "swin" in name
        else {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
    )
    model = redraw(timm.create_model(name, img_size=16, num_classes=5, **small))
    x = torch.randn(2, 3, 16, 16)
    graph_module = normalize(capture(model, [x]).graph_module)
    linears = [n for n in graph_module.graph.nodes if n.target is aten.linear.default]
    assert linears and all(a is None or a.op == "get_attr" for n in linears for a in n.args[1:])
    torch.testing.assert_close(output(graph_module, x), output(model, x), atol=1e-5, rtol=1e-4)
    assert match(graph_module).groups
