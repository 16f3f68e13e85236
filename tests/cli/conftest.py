"""The command line in this process, and files that it is run on, written once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Encoder, redraw, sequences, vit
from pictures import ARCH, predictions_of, write_images
from safetensors.torch import save_file

from repquant_fx.cli import main


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)
    return run


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
