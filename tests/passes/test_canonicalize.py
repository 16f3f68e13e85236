"""Canonicalize: fewer spellings, the same outputs."""

from __future__ import annotations

import pytest
import torch
from helpers import Function, aten, count, images, output, redraw, relative, swin, values_at, vit
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.frontends.capture import capture
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.operators import IDENTITIES, VIEWS


def captured(model: nn.Module, x: Tensor) -> GraphModule:
    return capture(model, [x]).graph_module


def canonicalized(model: nn.Module, x: Tensor) -> GraphModule:
    """Canonicalize, and check that the outputs stay for the batch captured and another."""
    graph_module = run_passes(captured(redraw(model), x), [Canonicalize()])
    for batch in (x, torch.cat([x, x.flip(0)])[1:]):
        assert relative(output(graph_module, batch), output(model, batch)) < 1e-5
    return graph_module


def tokens() -> Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [vit, swin])
def test_vision_transformers(make) -> None:
    graph_module = canonicalized(make(), images(3))
    assert count(graph_module, *IDENTITIES, *VIEWS, aten.conv2d.default, aten.addmm.default, aten.mm.default) == 0
    for node in graph_module.graph.nodes:
        if node.target is aten.reshape.default:
            assert -1 in node.args[1] or sum(isinstance(size, Node) for size in node.args[1]) != 1, (
                "one symbolic size must be inferred"
            )


@pytest.mark.parametrize("make", [vit, swin])
def test_idempotent(make) -> None:
    graph_module = captured(make(), images(2))
    assert Canonicalize()(graph_module).modified
    text = str(graph_module.graph)
    assert not Canonicalize()(graph_module).modified
    assert str(graph_module.graph) == text


def test_metadata_is_complete() -> None:
    graph_module = canonicalized(vit(), images(2))
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node


class Patches(nn.Module):
    def __init__(self, bias: bool = True, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, **{"kernel_size": (4, 2), "stride": (4, 2), "bias": bias, **options})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_becomes_a_linear(bias: bool) -> None:
    graph_module = canonicalized(Patches(bias), images(2))
    assert count(graph_module, aten.conv2d.default) == 0 and count(graph_module, aten.linear.default) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 4, "stride": 2},
        {"kernel_size": 4, "stride": 4, "padding": 4},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 4, "stride": 4, "groups": 3},
        {"kernel_size": 5, "stride": 5},
    ],
)  # 16 is no multiple of 5
def test_other_convolutions_stay(options: dict[str, object]) -> None:
    assert count(canonicalized(Patches(**options), images(2)), aten.conv2d.default) == 1


class Projections(nn.Module):
    """Every spelling of a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(6, 5))
        self.w3, self.bias = nn.Parameter(torch.ones(5, 7)), nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.matmul(x, self.w1)
        flat = torch.mm(h.reshape(-1, 6), self.w2)
        return torch.addmm(self.bias, flat, self.w3).reshape(-1, 4, 7)


def test_products_with_parameters_become_linears() -> None:
    graph_module = canonicalized(Projections(), tokens())
    assert count(graph_module, aten.linear.default) == 3
    assert count(graph_module, aten.matmul.default, aten.mm.default, aten.addmm.default) == 0


def test_a_tied_parameter_keeps_its_other_reader() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + x * self.w[0]

    assert count(canonicalized(Tied(), tokens()), aten.linear.default) == 1


def test_scaled_addmm_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.b, x.reshape(-1, 8), self.w, beta=0.5, alpha=2.0)

    assert count(canonicalized(Scaled(), tokens()), aten.linear.default) == 0


def test_products_of_activations_stay() -> None:
    graph_module = canonicalized(Function(lambda x: x @ x.transpose(1, 2)), tokens())
    assert count(graph_module, aten.matmul.default) == 1 and count(graph_module, aten.linear.default) == 0


def test_a_parameter_on_the_left_is_no_linear() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    assert count(canonicalized(Left(), tokens()), aten.linear.default) == 0


@pytest.mark.parametrize("function", [
    lambda x: x.clone() * 2, lambda x: x.contiguous() * 2, lambda x: x.detach() * 2, lambda x: x.to(torch.float32) * 2,
    lambda x: nn.functional.dropout(x, 0.5, False) * 2, lambda x: x[:, :] * 2, lambda x: x[:, 0:] * 2,
    lambda x: torch.roll(x, (0, 0), (1, 2)) * 2, lambda x: nn.functional.pad(x, (0, 0, 0, 0)) * 2,
    lambda x: x.clone().detach().contiguous().to(torch.float32) * 2])
def test_identities_disappear(function) -> None:
    assert [n.target for n in canonicalized(Function(function), tokens()).graph.nodes if n.op == "call_function"] == [
        aten.mul.Tensor
    ]


@pytest.mark.parametrize("function", [
    lambda x: x.to(torch.float64), lambda x: x[:, 1:], lambda x: x[:, :3], lambda x: x[:, ::2],
    lambda x: torch.roll(x, (1, 0), (1, 2)), lambda x: nn.functional.pad(x, (0, 0, 0, 1))])
def test_lookalikes_stay(function) -> None:
    graph_module = canonicalized(Function(lambda x: function(x) * 2), tokens())
    assert sum(n.op == "call_function" for n in graph_module.graph.nodes) >= 2


def test_a_model_that_is_an_identity() -> None:
    graph_module = canonicalized(Function(lambda x: x.clone()), tokens())
    assert not any(n.op == "call_function" for n in graph_module.graph.nodes)


def test_reshapes_become_static() -> None:
    graph_module = canonicalized(
        Function(lambda x: x.view(x.shape[0], 2, 2, 8).permute(0, 2, 1, 3).reshape(x.shape[0], 4, 8)), tokens()
    )
    reshapes = [n for n in graph_module.graph.nodes if n.target is aten.reshape.default]
    assert reshapes and all(n.args[1].count(-1) == 1 and all(isinstance(s, int) for s in n.args[1]) for n in reshapes)
    assert count(graph_module, aten.sym_size.int) == 0


def test_failures_name_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = captured(Function(lambda x: x.clone()), tokens())
    monkeypatch.setattr(Canonicalize, "run", lambda *_: 1 / 0)
    with pytest.raises(PassError, match="'canonicalize' failed after no other pass: ZeroDivisionError"):
        run_passes(graph_module, [Canonicalize()])


class Einsum(nn.Module):
    def __init__(self, equation: str, *sizes: int) -> None:
        super().__init__()
        self.equation, self.table = equation, nn.Parameter(torch.zeros(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x.reshape(-1, 4, 2, 4), self.table)


@pytest.mark.parametrize(
    "equation, sizes",
    [
        ("bhwc,hkc->bhwk", (4, 3, 4)),
        ("bhwc,wkc->bhwk", (2, 3, 4)),
        ("bhwc,kc->bkhw", (3, 4)),
        ("bhwc,bhkc->bhwk", (1, 4, 3, 4)),
        ("bhwc, cd -> bhdw", (4, 5)),
        ("bhwc,hdwc->bhwd", (4, 5, 2, 4)),
        ("bwhc,kch->wkbc", (3, 4, 2)),
    ],
)
def test_einsum_becomes_a_product(equation: str, sizes: tuple[int, ...]) -> None:
    graph_module = canonicalized(Einsum(equation, *sizes), tokens())
    assert (
        count(graph_module, aten.einsum.default) == 0
        and count(graph_module, aten.matmul.default, aten.linear.default) == 1
    )


@pytest.mark.parametrize(
    "equation, sizes",
    [
        ("bhwc,hc->bhw", (4, 4)),
        ("bhwc,kd->bhwckd", (3, 2)),
        ("bhwc,kwc->bhk", (3, 2, 4)),
        ("...c,kc->...k", (3, 4)),
        ("bhwc,hkd->bk", (4, 3, 2)),
    ],
)
def test_other_einsums_stay(equation: str, sizes: tuple[int, ...]) -> None:
    assert count(canonicalized(Einsum(equation, *sizes), tokens()), aten.einsum.default) == 1


def test_products_with_a_sum_are_both() -> None:
    def attention(x: Tensor) -> Tensor:
        logits = torch.baddbmm(x[:, :, :4], x, x.transpose(1, 2))
        return torch.addmm(logits[0], logits[1], logits[0])

    graph_module = canonicalized(Function(attention), tokens())
    assert count(graph_module, aten.baddbmm.default, aten.addmm.default) == 0
    assert count(graph_module, aten.matmul.default) == 2 and count(graph_module, aten.add.Tensor) == 2


def test_pooling_to_one_value_is_a_mean() -> None:
    def pool(x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(x, 1) + nn.functional.adaptive_avg_pool2d(x[:, None], 1)[:, 0]

    graph_module = canonicalized(Function(pool), tokens())
    assert (
        count(graph_module, aten.mean.dim) == 2
        and count(graph_module, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default) == 0
    )
    partly = canonicalized(Function(lambda x: nn.functional.adaptive_avg_pool1d(x, 2)), tokens())
    assert count(partly, aten.mean.dim) == 0


def test_a_sort_keeps_the_order_of_equal_elements() -> None:
    """As ONNX Runtime does; torch leaves it open."""
    x = torch.randint(0, 3, (4, 40), generator=torch.Generator().manual_seed(0)).float()
    graph_module = canonicalized(Function(lambda x: torch.sort(x, -1, True).values), x)
    assert count(graph_module, aten.sort.stable) == 1 and count(graph_module, aten.sort.default) == 0
    (node,) = graph_module.graph.find_nodes(op="call_function", target=aten.sort.stable)
    indices = torch.sort(x, dim=-1, descending=True, stable=True).indices
    assert torch.equal(values_at(graph_module, [node], x)[0][1], indices)
