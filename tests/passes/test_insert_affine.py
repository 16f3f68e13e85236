"""A factor and a shift per channel behind an activation function: one scale for the site, channels apart even so."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from helpers import Function, aten, canonical, output, sequences
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.passes.base import run_passes
from repquant_fx.passes.identity import NodeProbe
from repquant_fx.passes.insert_affine import InsertAffine
from repquant_fx.passes.operators import AFFINE

X = sequences(4)
W, V = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.randn(5, 16)
GELU = nn.functional.gelu


class MLP(nn.Module):
    """Its hidden channels lie on different scales, and away from zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.fc1.weight.mul_(torch.logspace(-1.5, 1, 16)[:, None])
            self.fc1.bias.copy_(torch.logspace(-1.5, 1, 16) * torch.randint(0, 4, (16,), generator=generator))
            self.fc2.weight.div_(torch.logspace(-1.5, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(GELU(self.fc1(x)))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def test_linears_read_the_activation_through_a_factor_and_a_shift() -> None:
    graph_module = canonical(Function(lambda x: (h := GELU(linear(x, W)), linear(h, V), linear(h, V + 1))[1:]), X)
    before = output(graph_module, X)
    run_passes(graph_module, [InsertAffine()], NodeProbe([X]))
    torch.testing.assert_close(output(graph_module, X), before)
    (affine,) = graph_module.graph.find_nodes(op="call_function", target=AFFINE)
    assert len(affine.users) == 2 and affine.args[0].target is aten.gelu.default
    assert not InsertAffine()(graph_module).modified


def test_what_others_read_too_is_left_alone() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        h = GELU(linear(x, W))
        return h, linear(h, V)

    each = InsertAffine()
    assert not each(canonical(Function(both), X)).modified
    assert [item.reason for item in each.left_alone] == ["something other than a Linear reads it as well"]


@pytest.mark.parametrize("container", ["int8", "int4"])
def test_the_file_has_one_scale_and_less_error(container: str) -> None:
    model, x = MLP().eval(), torch.randn(64, 3, 8, generator=torch.Generator().manual_seed(2))
    settings = {**PLAIN, "wbits": 8, "abits": 4, "input_bits": 8, "container": container}
    errors = []
    for affine in (False, True):
        made = compile(model, [x[:32]], Recipe(**settings, activation_affine=affine), example_inputs=[x[:2]])
        assert made.parity is not None and not made.parity.problems()
        (found,) = made.session().run(None, {"x": x[32:].numpy()})
        exact = model(x[32:]).detach()
        errors.append(float((torch.from_numpy(found) - exact).norm() / exact.norm()))
        layers = {layer["path"]: layer for layer in made.report["layers"]}
        assert (layers["fc2"]["group"] == "affine_linear") == affine
        assert isinstance(layers["fc2"]["inputs"][0]["scale"], float)
        operators = [node.op_type for node in made.proto.graph.node]
        assert operators.count("Mul") == affine
    assert errors[1] < 0.5 * errors[0], errors
