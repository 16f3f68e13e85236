"""ERQ by its official code (github.com/zysxmu/ERQ, `test_quant_expand.py`), on our models and images.

    python benchmarks/peers/erq.py CHECKOUT --calib train_folder --data test_folder --bits W4A4 W3A3 [--coe 20000]

`common.py` says what is changed from outside. The first 32 of the calibration images choose scales, all of them reduce
errors. The input of its patch embedding is not quantized, which favours it; the weights of qkv and fc1 have two grids
for each output channel, of input channels with and without outliers.
"""

from __future__ import annotations

import argparse
import sys

from common import Handed, Task, load_script, run, without_mask
from torch import nn

NAMES = {"vit": "vit_small", "swin": "swin_tiny"}  # the script tells by the name where the blocks are
RULES = ("the patch embedding's input stays float (8 bits in ours), its weights have W bits; the head has W and A "
         "bits; qkv and fc1 have two grids of weights; Softmax operands have one code more than A bits store")


def quantize(task: Task) -> nn.Module:
    script = load_script(task.checkout / "test_quant_expand.py")
    builder = sys.modules["utils.build_model"]
    builder.attention_forward = without_mask(builder.attention_forward)
    script.build_dataset = lambda _: (task.batches(size=len(task.calibration)), [])
    script.validate = Handed(position=2)
    script.args = argparse.Namespace(
        model=NAMES[task.family], device="cpu", seed=task.seed, w_bits=task.wbits, a_bits=task.abits,
        coe=task.options.coe, calib_batchsize=len(task.calibration),
    )
    script.main()
    return script.validate.model


if __name__ == "__main__":
    run("ERQ", __doc__, quantize, rules=RULES,
        options=[("--coe", {"type": int, "default": 20000, "help": "its strength of regularization (%(default)s)"})])
