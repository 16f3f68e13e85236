"""Files that the command line is run on, written once a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Encoder, redraw, sequences, vit
from pictures import ARCH, predictions_of, write_images
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`weights.pt`, `weights.safetensors` (with their architecture), `model.pt2`, `calib.npy`, `images/`, `tokens.npy`.
    """
    root = tmp_path_factory.mktemp("cli")
    model = vit(depth=1)
    state = model.state_dict()
    torch.save(state, root / "weights.pt")
    save_file(state, root / "weights.safetensors", {"arch": ARCH})
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    np.save(root / "calib.npy", images.numpy())
    program = torch.export.export(
        redraw(Encoder()), (sequences(4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, root / "model.pt2")
    np.save(root / "tokens.npy", sequences(16).numpy())
    write_images(root / "images", predictions_of(model))
    return root
