"""RepQ-ViT by its official code (github.com/zkkli/RepQ-ViT, `classification/`), on our models and images.

    python benchmarks/peers/repq_vit.py CHECKOUT --calib train_folder --data test_folder --bits W4A4 W3A3

`common.py` says what is changed from outside. The script calibrates on 32 images by default; here it gets all of
`--samples`, as one batch. Its Softmax operands have one code more than their bits can store: whatever lies below the
last level becomes zero. Where patches are merged, hooks bring the tokens into one row, as in the timm that it was
written for, since its observer takes the last axis of three for channels.
"""

from __future__ import annotations

import argparse
import sys

from common import SEEN, Handed, Task, load_script, run, without_mask
from timm.models.swin_transformer import PatchMerging
from torch import nn

NAMES = {"vit": "vit_small", "swin": "swin_tiny"}  # the script tells by the name where the blocks are


def merge_in_a_row(model: nn.Module) -> None:
    """Let every patch merging hand (N, L, C) to its Linear, as timm before 0.9 did, and not (N, H, W, C)."""
    for module in model.modules():
        if isinstance(module, PatchMerging):
            module.norm.register_forward_hook(lambda _, __, out: out.flatten(1, 2))
            module.register_forward_hook(lambda _, given, out: out.unflatten(1, [n // 2 for n in given[0].shape[1:3]]))


def quantize(task: Task) -> nn.Module:
    script = load_script(task.checkout / "classification/test_quant.py")
    merge_in_a_row(task.model)
    builder = sys.modules["utils.build_model"]
    builder.attention_forward = without_mask(builder.attention_forward)
    script.build_dataset = lambda _: (task.batches(size=len(task.calibration)), [])
    script.validate = Handed(position=2)
    script.args = argparse.Namespace(
        model=NAMES[task.family], device="cpu", seed=task.seed, w_bits=task.wbits, a_bits=task.abits
    )
    script.main()
    return script.validate.model


if __name__ == "__main__":
    run("RepQ-ViT", __doc__, quantize, rules=f"{SEEN}; Softmax operands have one code more than A bits store")
