"""FIMA-Q, APHQ-ViT and AdaLog are scripts of one descent: scales are searched, then blocks are reconstructed. What they
share. Their layers ask how much memory the GPU has, to choose how many candidates to try at once: it is said to have
8 GiB.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import BATCH, Handed, Task, load_script, without_mask
from torch import Tensor, nn


def configuration(path: Path, changes: Mapping[str, Any]) -> types.ModuleType:
    """The official configuration with some settings changed, as the module that a script imports."""
    spec = importlib.util.spec_from_file_location("official", path)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)

    class Config(official.Config):
        def __init__(self) -> None:
            super().__init__()
            for name, value in changes.items():
                assert hasattr(self, name), f"{path} has no setting {name}"
                setattr(self, name, value)

    module = types.ModuleType("configuration")
    module.Config = Config
    return module


def of_timm(base: type[nn.Module]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A block's forward as the installed timm has it, with the disturbance that a script may ask for."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = base.forward(self, x)
        return x + 1e-6 * (getattr(self, "perturb_u", False) - getattr(self, "perturb_d", False))

    return forward


def with_memory(layers: Sequence[types.ModuleType]) -> None:
    """Let the layers find a GPU where they ask for its memory, and nowhere else: an optimizer would use it."""

    def told(method: Callable[[Any], None]) -> Callable[[Any], None]:
        def ask(self: Any) -> None:
            with mock.patch.multiple(torch.cuda, is_available=lambda: True,
                                     get_device_properties=lambda _: types.SimpleNamespace(total_memory=8 << 30)):
                method(self)

        return ask

    name = "_initialize_calib_parameters"
    for each in {each for module in layers for each in vars(module).values() if name in getattr(each, "__dict__", ())}:
        setattr(each, name, told(getattr(each, name)))


def reconstructed(task: Task, config: str, widths: Sequence[int], switches: Sequence[str],
                  changes: Mapping[str, Any]) -> nn.Module:
    """Run a script's calibration and reconstruction.

    Args:
        task: what to quantize.
        config: the path of its configuration, with {} for the bits.
        widths: for which there is one; the nearest is taken for others.
        switches: further ones of the command line.
        changes: of its configuration.
    """
    from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock

    script = load_script(task.checkout / "test_quant.py")
    recon, wrap = sys.modules["utils.block_recon"], sys.modules["utils.wrap_net"]
    with_memory([sys.modules[f"quant_layers.{name}"] for name in ("conv", "linear", "matmul")])
    wrap.vit_attn_forward = without_mask(wrap.vit_attn_forward)
    recon.swin_block_forward = of_timm(SwinTransformerBlock)  # its own is for a timm whose windows had one size
    recon.swin_patchmerging_forward = of_timm(PatchMerging)
    if task.options.steps is not None:
        shorten(task.options.steps, recon.BlockReconstructor)
        if hasattr(script, "MLPReconstructor"):
            shorten(task.options.steps, script.MLPReconstructor)
    count = len(task.calibration)
    width = min(widths, key=lambda bits: abs(bits - task.wbits))
    sys.modules["configuration"] = configuration(task.checkout / config.format(width), {
        "w_bit": task.wbits, "a_bit": task.abits, "qhead_a_bit": task.abits, "optim_size": count, **changes})

    class Loaders:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def val_loader(self) -> list[Any]:
            return []

        def calib_loader(self, num: int, batch_size: int = BATCH, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
            return task.batches(min(num, count), batch_size)

    script.mydatasets = types.SimpleNamespace(ViTImageNetLoaderGenerator=Loaders)
    script.validate = Handed(position=1)
    script.save_model = lambda *_, **__: None
    parser = argparse.ArgumentParser(parents=[script.get_args_parser()])
    script.main(parser.parse_args([
        "--model", {"vit": "vit_small", "swin": "swin_tiny"}[task.family], "--config", "configuration.py",
        "--device", "cpu", "--seed", str(task.seed), "--calibrate", "--optimize", *switches]))
    torch.set_grad_enabled(True)
    return script.validate.model


def shorten(steps: int, reconstructor: type) -> None:
    """Change the number of steps, which is the default of an argument."""
    method = reconstructor.reconstruct_single_block
    reconstructor.reconstruct_single_block = functools.partialmethod(method, iters=steps)
