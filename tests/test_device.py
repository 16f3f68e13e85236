"""Where calibration computes: the same codes whoever calls, and a clear word where there is no such device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compiled import PLAIN, inputs
from helpers import aten, images, output, vit

from repquant_fx import InputError, Recipe, compile
from repquant_fx import device as devices
from repquant_fx.cli import main

RECIPE = Recipe(wbits=4, abits=4)


def test_autocast_changes_no_codes() -> None:
    """A caller who trains in bfloat16 gets the file that anyone gets."""
    plain = compile(vit(depth=1), inputs("vit"), RECIPE, batch_size=8, check=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = compile(vit(depth=1), inputs("vit"), RECIPE, batch_size=8, check=False)
        assert torch.is_autocast_enabled("cpu")
    assert within.to_bytes() == plain.to_bytes()


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta"])
def test_no_such_device(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--device cpu"):
        devices.usable(name)


def test_no_such_device_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compile",
        "timm:vit_tiny_patch16_224,depth=1,img_size=32",
        "--out",
        str(tmp_path / "x.onnx"),
        "--device",
        "cuda:99",
    ]
    assert main(command) == 2 and "cuda:99" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_moving_leaves_shared_tensors(vit_graph) -> None:
    """`meta` stands for a device: the graph's constants move, those of a copy that shares them do not."""
    graph_module = vit_graph()
    other = copy.copy(dict(graph_module.named_parameters()) | dict(graph_module.named_buffers()))
    devices.move(graph_module, torch.device("meta"))
    assert {t.device.type for t in [*graph_module.parameters(), *graph_module.buffers()]} == {"meta"}
    assert other and {t.device.type for t in other.values()} == {"cpu"}


def test_operators_that_create_tensors_follow() -> None:
    from helpers import Function, canonical

    graph_module = canonical(
        Function(lambda x: x + torch.arange(x.shape[0], device=x.device)[:, None, None, None]), images()
    )
    graph_module.register_buffer("anchor", torch.zeros(1))
    devices.move(graph_module, torch.device("meta"))
    (made,) = [
        n
        for n in graph_module.graph.nodes
        if n.target in (aten.arange.default, aten.arange.start_step, aten.arange.start)
    ]
    assert torch.device("meta") in made.kwargs.values()
    assert output(graph_module, images().to("meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", [RECIPE, Recipe(wbits=4, abits=4, **PLAIN)], ids=["repquant", "plain"])
def test_cuda_gives_the_same_model(recipe: Recipe, tmp_path: Path) -> None:
    model = vit()
    here = compile(model, inputs("vit"), recipe, batch_size=8)
    there = compile(model, inputs("vit"), recipe, batch_size=8, device="cuda", work_dir=tmp_path)
    again = compile(model, inputs("vit"), recipe, batch_size=8, device="cuda", work_dir=tmp_path)
    assert there.to_bytes() == again.to_bytes()
    assert abs(here.report["output_sqnr_db"] - there.report["output_sqnr_db"]) < 1.5
    assert {p.device.type for p in model.parameters()} == {"cpu"}
