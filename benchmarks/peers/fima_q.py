"""FIMA-Q by its official code (github.com/ShiheWang/FIMA-Q), on our models and images.

    python benchmarks/peers/fima_q.py CHECKOUT --calib train_folder --data test_folder --bits W4A4 [--steps 20000]

`common.py` says what is changed from outside. The configuration is the official `best.py` of the width (the nearest
where there is none for it): the first 128 of the calibration images choose scales, all of them optimize. Its grids are
finer than per tensor: activations have a scale for each head and for each token position; `--per-tensor` asks for one
scale per tensor, as a file for a runtime needs it.
"""

from __future__ import annotations

from common import SEEN, Task, run
from reconstructing import reconstructed
from torch import nn


def quantize(task: Task) -> nn.Module:
    grids = {"matmul_head_channel_wise": False, "token_channel_wise": False} if task.options.per_tensor else {}
    return reconstructed(task, "configs/{}bit/best.py", (3, 4, 6), [], grids)


if __name__ == "__main__":
    run("FIMA-Q", __doc__, quantize, steps=True,
        rules=f"{SEEN}; a scale for each head and token position unless per tensor",
        options=[("--per-tensor", {"action": "store_true", "help": "one scale per tensor of activations"})])
