"""What the samples of the documents are run on: a folder with a tiny model, pictures and arrays, written once a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import vit
from PIL import Image

PICTURES = 160
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.pt2`, `model.pt`, `images/` and `val/` (class folders; the label is what the float model sees), `samples.npz`."""
    root = tmp_path_factory.mktemp("world")
    model = vit(depth=1)
    generator = np.random.default_rng(0)
    pixels = np.stack([np.asarray(Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC))
                       for small in generator.integers(0, 256, (PICTURES, 4, 4, 3), dtype=np.uint8)])
    samples = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float().contiguous()
    with torch.no_grad():
        labels = model(samples).argmax(1)
    for folder in ("images", "val"):
        for label in range(5):
            (root / folder / f"class_{label}").mkdir(parents=True)
    for index, label in enumerate(labels.tolist()):
        folder = "images" if index < PICTURES - 40 else "val"
        Image.fromarray(pixels[index]).save(root / folder / f"class_{label}" / f"{index:03}.png")
    np.savez(root / "samples.npz", samples.numpy())
    program = torch.export.export(model, (samples[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, root / "model.pt2")
    torch.save(model, root / "model.pt")
    return root
