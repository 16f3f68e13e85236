"""Table I on made-up classes and random weights: what is run, what is printed beside it, what is run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagenet
import numpy as np
import pytest
from compiled import PLAIN
from helpers import vit
from PIL import Image
from safetensors.torch import save_file

from repquant_fx import Recipe

CLASSES = 20
ARCH = f"timm:vit_tiny_patch16_224,img_size=16,patch_size=4,embed_dim=32,num_heads=2,depth=1,num_classes={CLASSES}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/` of 20 classes, and `weights.safetensors`."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / f"images/n{label:02d}"
        folder.mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    save_file(vit(depth=1, num_classes=CLASSES).state_dict(), root / "weights.safetensors")
    return root


def run(place: Path, *more: str) -> None:
    images = str(place / "images")
    imagenet.main(["--data", images, "--calib", images, "--models", "deit_small", "--bits", "W4A4",
                   "--weights", str(place / "weights.safetensors"), "--arch", ARCH, "--calib-samples", "8",
                   "--json", str(place / "rows.json"), *more])


def test_one_command_prints_ours_beside_the_published(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plain(wbits: int, abits: int, steps: int) -> dict[str, Recipe]:
        return {label: Recipe(wbits=wbits, abits=abits, **PLAIN) for label in imagenet.OURS}

    monkeypatch.setattr(imagenet, "recipes", plain)  # all the same, so one compile; which they are is another test
    run(place, "--images", "30")
    lines = capsys.readouterr().out.splitlines()
    table = {tuple(c.strip() for c in row.split("|")[1:3]): row.split("|")[3].strip() for row in lines if "|" in row}
    published = {method: table["W4A4", f"{method}, published"] for method in imagenet.METHODS}
    assert published == {"RepQ-ViT": "69.03", "RepQuant": "75.21", "FIMA-Q": "76.87", "GLF-Q": "77.34"}
    assert table["float", "published"] == "79.85"
    measured = [table["float", "measured"], *(table["W4A4", method] for method in imagenet.OURS)]
    assert all(0 <= float(figure) <= 100 for figure in measured) and len(measured) == 5

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a stored row was measured again")

    monkeypatch.setattr(imagenet.Bench, "compiled", again)
    run(place, "--images", "30")
    assert capsys.readouterr().out.splitlines()[-len(table):] == lines[-len(table):]
    with pytest.raises(AssertionError, match="measured again"):
        run(place, "--images", "20")  # other settings, another figure


def test_rows_are_the_methods() -> None:
    repq, published, default, reconstructed = imagenet.recipes(4, 4, 7).values()
    assert not repq.gptq and published.clipping == "adam" and not published.correction
    assert default == Recipe(wbits=4, abits=4) and reconstructed == Recipe(wbits=4, abits=4, reconstruct=7)
    assert list(imagenet.recipes(4, 4, 0)) == list(imagenet.OURS[:3])


def test_every_column_of_the_paper_has_its_figures() -> None:
    rows = imagenet.table({}, list(imagenet.PUBLISHED), [(6, 6), (4, 4), (3, 3)]).splitlines()
    figures = {tuple(c.strip() for c in row.split("|")[1:3]): row.count(".") for row in rows[2:]}
    expected = [("float", "published"), *(("W6A6", f"{m}, published") for m in imagenet.METHODS[:2]),
                *(("W4A4", f"{m}, published") for m in imagenet.METHODS),
                *(("W3A3", f"{m}, published") for m in imagenet.METHODS[2:])]
    assert figures == dict.fromkeys(expected, len(imagenet.PUBLISHED))


def test_weights_are_of_one_model(place: Path) -> None:
    with pytest.raises(SystemExit):
        run(place, "--models", "deit_small", "vit_small")
