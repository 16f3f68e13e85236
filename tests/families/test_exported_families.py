"""Each family as a `.pt2`, as torch exports it and decomposed to core ATen: no check of the loader refuses it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from models import FAMILIES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repquant_fx.frontends.exported import load_exported


class Positional(nn.Module):
    """A model that takes its named inputs by position and gives the outputs that are kept."""

    def __init__(self, model: nn.Module, names: list[str], outputs: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *inputs: Tensor) -> Any:
        found = self.model(**dict(zip(self.names, inputs))) if self.names != ["x"] else self.model(*inputs)
        return tuple(found[name] for name in self.outputs) if self.outputs else found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_program_of_each_family_loads(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.inputs(2, 10, 0)
    args = tuple(inputs.values())
    model = Positional(family.model(), list(inputs), family.outputs).eval()
    free = tuple({axis: torch.export.Dim.AUTO for axis in axes} for axes in family.free(list(inputs)))
    with torch.no_grad():
        exported = torch.export.export(model, args, dynamic_shapes=(free,), strict=False)
        expected = pytree.tree_leaves(model(*args))
        for program in (exported, exported.run_decompositions()):
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            loaded, stored, _ = load_exported(buffer.getvalue(), f"{name}.pt2")
            found = pytree.tree_leaves(loaded.module(check_guards=False)(*stored))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
