"""Weights that stay in their files: the same models, the same bytes, no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language import LINES, MODELS, make, save
from safetensors.torch import save_file
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.huggingface import load_directory
from repquant_fx.frontends.mapped import map_file

FAST = Recipe(
    wbits=4,
    abits=8,
    gptq=False,
    correction=False,
    clipping="none",
    activations="minmax",
    weights="minmax",
    softmax_scale="percentile",
)


def on_disk(model: nn.Module) -> set[bool]:
    """Whether parameters are parts of a larger storage, that of a file."""
    return {p.untyped_storage().nbytes() > p.nbytes for p in model.parameters()}


@pytest.mark.parametrize("name", [n for n in MODELS if n != "sam"])
def test_the_same_model(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    here, task = load_directory(tmp_path / "model")
    there, other = load_directory(tmp_path / "model", None, tmp_path / "scratch")
    assert task == other and type(here) is type(there) and not there.training
    assert on_disk(there) == {name != "vit"}  # its names in files are not those of its modules: the ordinary way
    first, second = here.state_dict(), there.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
    buffers = dict(here.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in there.named_buffers())
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_converted_in_a_file_without_a_name(dtype: torch.dtype, tmp_path: Path) -> None:
    make("llama").to(dtype).save_pretrained(tmp_path / "model", max_shard_size="5KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    here, _ = load_directory(tmp_path / "model")
    there, _ = load_directory(tmp_path / "model", None, tmp_path / "scratch")
    assert {p.dtype for p in there.parameters()} == {torch.float32} and on_disk(there) == {True}
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values()))
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_the_same_file(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", with_tokenizer=True)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    plain, mapped = (
        compile(str(tmp_path / "model"), str(tmp_path / "text.txt"), FAST, samples=20, check=False, offload_dir=folder,
                with_past=False)
        for folder in (None, tmp_path / "scratch")
    )
    assert plain.to_bytes() == mapped.to_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_base_model_goes_the_ordinary_way(tmp_path: Path) -> None:
    """Names without the head's prefix do not fit one to one."""
    model = make("bert")
    model.bert.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    loaded, _ = load_directory(tmp_path / "model", "feature-extraction", tmp_path / "scratch")
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


def test_damaged_files_are_refused_as_ever(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_directory(tmp_path / "model", None, tmp_path / "scratch")


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.randn(4).half()}
    save_file(tensors, tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + data[8:8 + length] + b" " + data[8 + length:]
    (tmp_path / "u.safetensors").write_bytes(shifted)
    for file in ("t.safetensors", "u.safetensors"):
        found = map_file(tmp_path / file)
        assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_writing_to_a_view_leaves_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5)}, tmp_path / "t.safetensors")
    map_file(tmp_path / "t.safetensors")["a"].zero_()
    assert torch.equal(map_file(tmp_path / "t.safetensors")["a"], torch.ones(5))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_takes_no_memory(tmp_path: Path) -> None:
    """100 MB of weights: what the process holds besides pages of files grows by less than a third of that."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, vocab_size=2048
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    script = f"""
import re
from pathlib import Path
from transformers import LlamaForCausalLM
from repquant_fx.frontends.huggingface import load_directory
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
load_directory(Path({str(tmp_path / "tiny")!r}), None, {str(tmp_path / "scratch")!r})  # imports
before = anonymous()
model, _ = load_directory(Path({str(tmp_path / "model")!r}), None, {str(tmp_path / "scratch")!r})
size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
total = sum(float(p.sum()) for p in model.parameters())
print(size, anonymous() - before)
"""
    save("llama", tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size > 90 and grown < size / 3
