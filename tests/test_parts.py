"""A module inside a model compiled by itself, and put back in its place."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import PLAIN
from helpers import FAST, redraw, relative
from pictures import ARCH
from torch import Tensor, nn

from repquant_fx import InputError, Recipe, compile, compile_in_place
from repquant_fx.errors import CaptureError
from repquant_fx.frontends.part import proposal
from repquant_fx.runtime import session

RECIPE = Recipe(wbits=8, abits=8, **PLAIN)


class Backbone(nn.Module):
    """Features in a mapping, as those of torchvision's detectors are."""

    width = 12

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Mapping[str, Any]:
        features = self.two(torch.relu(self.one(x)))
        return {"0": features * scale if mask is None else features * scale * mask, "sizes": [4, "words"]}


class Detector(nn.Module):
    """What it gives depends on how many values pass a threshold: torch.export cannot capture that."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.masked, self.unused = Backbone(), nn.Linear(12, 1), masked, nn.Linear(2, 2)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        stacked = torch.stack(list(images)) * 2
        mask = {"mask": (stacked[..., :1] > -1).float()} if self.masked else {}
        features = self.backbone(stacked, 0.5, **mask)["0"]
        assert self.backbone.width == 12
        return [x[s[:, 0] > 0] if s.max() > 0 else x[:0] for x, s in zip(features, self.head(features))]


def pictures(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["plain", "masked"])
def detector(request: pytest.FixtureRequest) -> nn.Module:
    return redraw(Detector(request.param))


def test_what_cannot_be_captured_says_which_part_may(detector: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"--module backbone has 9\d % of the parameters"):
        compile(detector, pictures(), RECIPE, example_inputs=[pictures(2)])
    assert proposal(nn.ReLU()) == proposal("a program") == ""


def test_a_part_is_compiled_on_what_reaches_it(detector: Detector) -> None:
    compiled = compile(detector, pictures(), RECIPE, example_inputs=[pictures(2)], module="backbone")
    names = ["x", "mask"] if detector.masked else ["x"]
    assert [value.name for value in compiled.proto.graph.input] == names
    assert compiled.parity is not None and not compiled.parity.problems()
    assert compiled.report["source"] == "backbone of Detector in memory" and compiled.report["output_sqnr_db"] > 20
    x = 2 * pictures()[:5]
    feed = {"x": x.numpy(), **({"mask": (x[..., :1] > -1).float().numpy()} if detector.masked else {})}
    expected = detector.backbone(x, 0.5, *map(torch.from_numpy, list(feed.values())[1:]))["0"]
    (found,) = compiled.session().run(None, feed)
    assert relative(torch.from_numpy(found), expected) < 0.2


def test_in_its_place_the_rest_stays_as_it_is(detector: Detector) -> None:
    x, original = pictures()[:5], detector.backbone
    with torch.no_grad():
        expected = detector(x)
    compiled = compile_in_place(detector, "backbone", pictures(), RECIPE, example_inputs=[pictures(2)], threads=1)
    with torch.no_grad():
        found = detector(list(x))
        given = (x, 0.5, torch.ones(5, 6, 1)) if detector.masked else (x, 0.5)
        direct, before = detector.backbone(*given), original(*given)
    assert [each.shape[1] for each in found] == [12] * 5
    assert list(direct) == ["0", "sizes"] and direct["sizes"] == [4, "words"]
    assert 0 < relative(direct["0"], before["0"]) < 0.1
    assert detector.backbone.original is original and detector.backbone.width == 12
    assert detector.backbone.compiled is compiled and "backbone.one.weight" not in detector.state_dict()
    with pytest.raises(InputError, match=re.escape("does not run on {'x': (5, 4, 3)")):
        detector.backbone(torch.zeros(5, 4, 3), *given[1:2])
    detector.set_submodule("backbone", original)
    with torch.no_grad():
        assert all(map(torch.equal, detector(x), expected))


@pytest.mark.parametrize(
    ("path", "words"),
    [("backbon", "has no such module; it has backbone"), ("unused", "never calls its module unused"), ("", "no such")],
)
def test_other_paths_are_refused(path: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compile(Detector(), pictures(), RECIPE, example_inputs=[pictures(2)], module=path)


def test_what_is_no_tensor_is_refused() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Detector()

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.inner(list(x))

    with pytest.raises(InputError, match="inner takes images, a list; a part takes tensors only"):
        compile(Listed(), pictures(), RECIPE, example_inputs=[pictures(2)], module="inner")


def test_the_command_line_compiles_a_part(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "calib.npy", images.numpy())
    out = tmp_path / "block.onnx"
    command = [sys.executable, "-m", "repquant_fx", "compile", ARCH, "--module", "blocks.0", "--calib",
               str(tmp_path / "calib.npy"), "--out", str(out), "--json", *FAST]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tokens,) = session(out).get_inputs()
    assert tokens.shape == ["batch", 17, 32] and '"source": "blocks.0 of timm:' in done.stdout
    out.unlink()
    command[command.index("blocks.0")] = "blocks.7"
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no such module; it has blocks.0" in wrong.stderr


@pytest.mark.slow
def test_a_detector_of_torchvision() -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64, box_score_thresh=0.0)
    x = torch.rand(4, 3, 64, 64)
    with pytest.raises(CaptureError, match="--module backbone has"):
        compile(model, x, RECIPE, example_inputs=[x[:2]])
    compiled = compile_in_place(model, "backbone", x, RECIPE, example_inputs=[x[:2]], batch_size=2)
    assert [value.name for value in compiled.proto.graph.output] == ["0", "1", "2", "3", "pool"]
    with torch.no_grad():
        found = model(list(x))
    assert len(found) == 4 and all({"boxes", "masks"} <= set(each) for each in found)
