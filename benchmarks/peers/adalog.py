"""AdaLog by its official code (github.com/GoatWu/AdaLog), with its block reconstruction, on our models and images.

    python benchmarks/peers/adalog.py CHECKOUT --calib train_folder --data test_folder --bits W4A4 [--steps 20000]

`common.py` says what is changed from outside. The configuration is the official one of the width (the nearest where
there is none for it): the first 32 of the calibration images choose scales and bases of logarithms, all of them
optimize. Queries, keys and values have a scale for each head; Softmax and GELU have logarithmic grids of a base of
their own.
"""

from __future__ import annotations

from common import SEEN, Task, run
from reconstructing import reconstructed
from torch import nn


def quantize(task: Task) -> nn.Module:
    return reconstructed(task, "configs/{}bit.py", (3, 4, 6), [], {"s_bit": task.abits})


if __name__ == "__main__":
    run("AdaLog", __doc__, quantize, steps=True, rules=f"{SEEN}; a scale for each head; GELU on a logarithmic grid")
