"""Models with sizes that depend on values: compiled, or refused as bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.errors import InputError

CHOSEN = torch.tensor([True, False, True, True])


class Columns(nn.Module):
    """The columns of a Linear that a table names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.register_buffer("chosen", CHOSEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.norm(x))[:, self.chosen.nonzero()[:, 0]] * 2


class Tokens(Columns):
    """Attention of the tokens that a table names."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.first(x.unsqueeze(-1).expand(-1, -1, 4)))[:, self.chosen.nonzero()[:, 0]]
        return (rows @ rows.transpose(1, 2)).softmax(-1) @ rows


@pytest.mark.parametrize("model", [Columns(), Tokens()], ids=["columns", "tokens"])
@pytest.mark.parametrize("rotate", [(), ("residual", "heads")], ids=["", "rotated"])
def test_sizes_that_depend_on_values(model: nn.Module, rotate: tuple[str, ...]) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    try:
        result = compile(model, x, Recipe(rotate=rotate), example_inputs=(x[:2],))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert result.parity is not None
