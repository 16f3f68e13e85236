"""Values between segments on the disk: the same tensors, the same bytes, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Encoder, images, redraw, sequences, vit
from torch import Tensor
from torch.fx import Graph

from repquant_fx import Recipe, compile
from repquant_fx import offload as offload_module
from repquant_fx.errors import OutputError
from repquant_fx.offload import Cuts, OffloadedCuts, cuts_of


def layout(t: Tensor) -> tuple[object, ...]:
    return t.dtype, t.shape, t.stride(), t.storage_offset()


def test_tensors_come_back_with_their_strides(tmp_path: Path) -> None:
    graph = Graph()
    nodes = [graph.placeholder(n) for n in "abcdefg"]
    base = torch.randn(4, 6, 8)
    values = [
        base,
        base.transpose(1, 2),
        base[1:, :, ::2],
        torch.randn(1, 1, 5).expand(3, 2, 5),
        torch.arange(5),
        torch.zeros(0, 3),
        7,
    ]
    cuts = OffloadedCuts([{nodes[0]: base}, {nodes[0]: base}], tmp_path)
    assert cuts[0][nodes[0]] is base, "what the caller holds is not written"
    for factor in (1, 2):  # a second time from the file to the next
        cuts.replace(lambda cut, factor=factor: dict(zip(nodes, values)) if factor == 1 else dict(cut))
        assert len(cuts) == 2 and len(list(cuts)) == 2
        for cut in cuts:
            found = list(cut.values())
            assert found[-1] == 7
            for a, b in zip(found[:-1], values[:-1]):
                assert layout(a) == layout(b) and torch.equal(a, b)
            assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_kept_in_memory_by_default() -> None:
    assert type(cuts_of([{}], None)) is Cuts


@pytest.mark.parametrize("which", ["vit", "encoder"])
def test_the_same_bytes(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (vit(1), images(24)) if which == "vit" else (redraw(Encoder()), sequences(24))
    written = []
    write = offload_module._write
    monkeypatch.setattr(
        offload_module, "_write", lambda file, values: written.append(len(values)) or write(file, values)
    )
    inside, outside = (
        compile(model, x, Recipe(4, 4), batch_size=8, check=False, example_inputs=[x[:2]], offload_dir=folder)
        for folder in (None, tmp_path / "new")
    )
    assert inside.to_bytes() == outside.to_bytes()
    # a module's weights have no file to stay in
    assert not inside.report["notes"] and "held in memory" in outside.report["notes"][0]
    assert len(written) == 2 * 3 * (outside.report["segments"] - 1), "both models, every batch, every cut"
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload_module, "_write", full)
    with pytest.raises(OutputError, match=f"cannot keep values in {tmp_path}: No space left"):
        OffloadedCuts([{}], tmp_path).replace(lambda cut: cut)
