"""Pictures and what a model says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

ARCH = "timm:vit_tiny_patch16_224,img_size=16,patch_size=4,embed_dim=32,depth=1,num_heads=2,num_classes=5"


def predictions_of(model: torch.nn.Module):
    """What timm's own preprocessing and the model say of a picture."""
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({"input_size": (3, 16, 16)}, model=model), is_training=False)

    def predict(picture: Image.Image) -> int:
        with torch.no_grad():
            return int(model(transform(picture)[None]).argmax())
    predict.transform = transform  # type: ignore[attr-defined]
    return predict


def write_images(root: Path, predict) -> None:
    """Smooth random pictures in the folder of the class that the float model sees; one wrong picture in each folder."""
    generator = np.random.default_rng(0)
    for label in range(5):
        (root / f"class_{label}").mkdir(parents=True)
    for index in range(40):
        small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((24, 20), Image.Resampling.BICUBIC)
        label = predict(picture)
        picture.save(root / f"class_{label if index % 8 else (label + 1) % 5}" / f"{index:02}.png")


