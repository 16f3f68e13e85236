"""How large a file will be, told before the work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compiled import PLAIN
from helpers import canonical, match
from torch import Tensor, nn

from repquant_fx import Recipe, compile
from repquant_fx.cli import main
from repquant_fx.errors import OutputError
from repquant_fx.exporters.apart import BESIDE_FROM
from repquant_fx.forecast import announce, check_room, predicted_bytes


class Tied(nn.Module):
    """A table that is also the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(600, 256), nn.Linear(256, 256)
        self.head = nn.Linear(256, 600, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.table(tokens))))


TOKENS = torch.arange(32).reshape(8, 4)


@pytest.mark.parametrize("bits", [{"wbits": 4}, {"wbits": 8}, {"wbits": 4, "abits": "none", "group_size": 32}])
def test_the_prediction_is_near(bits: dict[str, Any]) -> None:
    recipe = Recipe.of({**PLAIN, **bits})
    graph_module = canonical(Tied(), TOKENS)
    predicted = predicted_bytes(graph_module, match(graph_module, recipe), recipe.group_size)
    written = compile(Tied(), TOKENS, recipe, example_inputs=[TOKENS[:2]], check=False).report["file_bytes"]
    assert abs(predicted - written) < 0.1 * written


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2000, 1000, 1000) if folder == tmp_path else None)
    check_room(tmp_path / "m.onnx", 1000)
    with pytest.raises(OutputError, match=r"the file takes about 1.0 KB, and the disk of .* has 1.0 KB free"):
        check_room(tmp_path / "new" / "m.onnx", 1001)
    announce(1001)
    with pytest.raises(OutputError, match="takes about"):
        announce(1001, out=tmp_path / "m.onnx")


def test_it_is_refused_before_the_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    torch.export.save(torch.export.export(Tied().eval(), (TOKENS[:2],)), tmp_path / "m.pt2")
    assert main(["compile", str(tmp_path / "m.pt2"), "--calib", str(tmp_path / "none.npy"), "--out",
                 str(tmp_path / "m.onnx")]) == 2
    assert "0.0 B free" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize(
    "size, asked, beside", [(BESIDE_FROM - 1, False, False), (BESIDE_FROM, False, True), (1, True, True)])
def test_verbose_says_it(size: int, asked: bool, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("repquant_fx.log.detail", said.append)
    announce(size, asked)
    assert said[0].startswith("the file takes about ") and ("data file" in said[0]) == beside
