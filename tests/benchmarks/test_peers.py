"""What surrounds a peer's script, with a made-up checkout: our model and images go in, its model comes out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common
import pytest
import repq_vit
import torch
from helpers import images, vit
from torch import nn

BUILDER = """
import timm
from types import MethodType

def attention_forward(self, x):
    B, N, C = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
    return self.proj(x.transpose(1, 2).reshape(B, N, C))

def build_model(name):
    model = timm.create_model(name, pretrained=True)
    for block in model.blocks:
        block.attn.forward = MethodType(attention_forward, block.attn)
    return model
"""
SCRIPT = """
import torch
from utils.build_model import *
loaded = 0

def build_dataset(args):
    raise FileNotFoundError("ImageNet")

def main():
    global loaded
    loaded += 1
    assert loaded == 1, "not a new module"
    print("noise on stdout")
    open("scratch", "w").close()
    train, _ = build_dataset(args)
    batch, _ = next(iter(train))
    model = build_model(args.model)
    assert not [n for n, m in model.named_modules() if "q_norm" in n]
    model(batch.cuda())
    with torch.no_grad():
        model.head.weight.mul_(args.w_bits)
    validate(args, None, model, None, args.device)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout/classification"
    (folder / "utils").mkdir(parents=True)
    (folder / "utils/__init__.py").touch()
    (folder / "utils/build_model.py").write_text(BUILDER)
    (folder / "test_quant.py").write_text(SCRIPT)
    return tmp_path / "checkout"


def quantized(checkout: Path, model: nn.Module, bits: int) -> nn.Module:
    task = common.Task(checkout, model, "vit", images(4), bits, bits, 0, argparse.Namespace())
    with common.surroundings(task.model):
        return repq_vit.quantize(task)


def test_the_script_runs_on_our_model(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    model, here = vit(depth=1), Path.cwd()
    before, weight = model(images(4)), model.head.weight.clone()
    for bits in (2, 3):  # the second time, too, as if it were the first
        found = quantized(checkout, model, bits)
        assert torch.equal(found.head.weight, bits * weight)
        with torch.no_grad():
            found.head.weight.div_(bits)
        torch.testing.assert_close(found(images(4)), before)
    assert torch.equal(model.head.weight, weight) and Path.cwd() == here
    assert not (here / "scratch").exists() and not capsys.readouterr().out


def test_a_checkout_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="official checkout"):
        common.load_script(tmp_path / "test_quant.py")
    with pytest.raises(SystemExit, match="--commit"):
        common.commit_of(tmp_path, None)
    assert common.commit_of(tmp_path, "abc") == "abc"


def test_a_mask_is_refused() -> None:
    attention = common.without_mask(lambda self, x: 2 * x)
    one = torch.ones(1)
    assert attention(nn.Identity(), one, attn_mask=None, is_causal=False) == 2
    with pytest.raises(NotImplementedError):
        attention(nn.Identity(), one, attn_mask=one)


def test_bits() -> None:
    assert common.bits_of("W2A4") == (2, 4)
    with pytest.raises(argparse.ArgumentTypeError):
        common.bits_of("4")


def test_table_has_a_row_for_each_width() -> None:
    rows = {("ViT", "float"): {0: {"top1": 85.7, "sqnr_db": 999.0}},
            ("ViT", "ERQ W4A4"): {0: {"top1": 84.0, "sqnr_db": 12.0}, 1: {"top1": 84.2, "sqnr_db": 12.0}}}
    printed = common.accuracy_table(rows).splitlines()
    assert printed[2:] == ["| float | 85.70 |  |", "| ERQ W4A4 | 84.10 ± 0.14 | 12.00 |"]
