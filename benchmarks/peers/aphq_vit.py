"""APHQ-ViT by its official code (github.com/GoatWu/APHQ-ViT), on our models and images.

    python benchmarks/peers/aphq_vit.py CHECKOUT --calib train_folder --data test_folder --bits W4A4 [--steps 20000]

`common.py` says what is changed from outside. The configuration is the official `best.py` of the width (the nearest
where there is none for it): MLPs are refitted with ReLU for GELU, the first 128 of the calibration images choose
scales, all of them optimize. Queries, keys, values and probabilities have a scale for each head.
"""

from __future__ import annotations

from common import SEEN, Task, run
from reconstructing import reconstructed
from torch import nn


def quantize(task: Task) -> nn.Module:
    return reconstructed(task, "configs/{}bit/best.py", (2, 3, 4), ["--reconstruct-mlp"], {})


if __name__ == "__main__":
    run("APHQ-ViT", __doc__, quantize, steps=True, rules=f"{SEEN}; ReLU for GELU; a scale for each head")
