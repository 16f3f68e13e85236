"""What the samples of the documents are run on: a folder with a tiny model, pictures and arrays, written once a
session.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import PIXELS, model

PICTURES = 120
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.pt2`, `model.pt`, `images/` and `val/` (class folders; the label is what the float model sees),
    `samples.npz`.
    """
    root = tmp_path_factory.mktemp("world")
    float_model = model()
    generator = np.random.default_rng(0)
    pixels = np.stack([np.asarray(Image.fromarray(small).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
                       for small in generator.integers(0, 256, (PICTURES, 4, 4, 3), dtype=np.uint8)])
    samples = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float().contiguous()
    with torch.no_grad():
        labels = float_model(samples).argmax(1)
    for folder in ("images", "val"):
        for label in range(5):
            (root / folder / f"class_{label}").mkdir(parents=True)
    for index, label in enumerate(labels.tolist()):
        folder = "images" if index < PICTURES - 40 else "val"
        Image.fromarray(pixels[index]).save(root / folder / f"class_{label}" / f"{index:03}.png")
    np.savez(root / "samples.npz", samples.numpy())
    program = torch.export.export(float_model, (samples[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, root / "model.pt2")
    torch.save(float_model, root / "model.pt")
    return root
