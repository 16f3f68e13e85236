"""`--out DIR` under optimum's ONNX Runtime classes.

optimum needs an older transformers than ours, so it lives in an environment of its own: OPTIMUM_PYTHON names its
interpreter (`python -m venv there; there/bin/pip install 'optimum-onnx[onnxruntime]' torch`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import FAST
from language import LINES, save
from seq2seq import FEATURES, FRAMES
from seq2seq import save as save_pair

from repquant_fx.cli import main
from repquant_fx.generation import exported_halves, exported_runner, generate

OTHER = os.environ.get("OPTIMUM_PYTHON", "")
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from optimum import onnxruntime as ort
name, folder, cache = sys.argv[1:]
options = {"use_cache": cache == "True", "use_io_binding": False} if "Causal" in name else {}
model = getattr(ort, name).from_pretrained(folder, **options)
if "Image" in name:
    feed = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
else:
    ids, mask = torch.tensor([[3, 5, 7, 4], [6, 2, 8, 9]]), torch.ones(2, 4, dtype=torch.int64)
    feed = {"input_ids": ids, "attention_mask": mask}
print(json.dumps({"class": type(model).__name__, "logits": model(**feed).logits.tolist(),
                  "generated": model.generate(**feed, max_new_tokens=3)[:, 4:].tolist() if "Causal" in name else None}))
"""


@pytest.mark.skipif(not OTHER, reason="set OPTIMUM_PYTHON to the interpreter of an environment that has optimum-onnx")
@pytest.mark.parametrize(
    "name, cls, options",
    [
        ("bert", "ORTModelForSequenceClassification", []),
        ("vit", "ORTModelForImageClassification", []),
        ("llama", "ORTModelForCausalLM", ["--no-with-past"]),
        ("llama", "ORTModelForCausalLM", []),
        ("llama", "ORTModelForCausalLM", ["--cache", "float"]),
    ],
)
def test_optimum_loads_the_directory(name: str, cls: str, options: list[str], tmp_path: Path) -> None:
    save(name, tmp_path / "source", with_tokenizer=name != "vit")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    cached = name == "llama" and "--no-with-past" not in options
    calibration = [*options, *([] if name == "vit" else ["--calib", str(tmp_path / "text.txt")])]
    assert (
        main(["compile", str(tmp_path / "source"), "--out", str(tmp_path / "out"), *calibration, "--quiet", *FAST]) == 0
    )
    (tmp_path / "load.py").write_text(SCRIPT)
    done = subprocess.run(
        [OTHER, str(tmp_path / "load.py"), cls, str(tmp_path / "out"), str(cached)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == cls and len(found["logits"]) == 2
    if name == "llama":
        assert len(found["generated"][0]) == 3
    if cached:
        runner = exported_runner(tmp_path / "out")
        mine = [generate(runner, prompt, 3).tokens for prompt in ([3, 5, 7, 4], [6, 2, 8, 9])]
        assert found["generated"] == mine


PAIR = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from optimum import onnxruntime as ort
cls, folder, features, frames = sys.argv[1:]
model = getattr(ort, cls).from_pretrained(folder, use_cache=False, use_io_binding=False)
if "Speech" in cls:
    feed = {"input_features": torch.randn(1, int(features), int(frames), generator=torch.Generator().manual_seed(0))}
else:
    ids = torch.tensor([[0, 5, 7, 4, 9, 6]])
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
ids = model.generate(**feed, max_new_tokens=8, do_sample=False, num_beams=1)
print(json.dumps({"class": type(model).__name__, "generated": ids[0].tolist()}))
"""


@pytest.mark.skipif(not OTHER, reason="set OPTIMUM_PYTHON to the interpreter of an environment that has optimum-onnx")
@pytest.mark.parametrize("name, cls", [
    ("t5", "ORTModelForSeq2SeqLM"), ("bart", "ORTModelForSeq2SeqLM"), ("whisper", "ORTModelForSpeechSeq2Seq")])
def test_optimum_loads_an_encoder_and_a_decoder(name: str, cls: str, tmp_path: Path) -> None:
    save_pair(name, tmp_path / "source")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    np.save(tmp_path / "sounds.npy", np.random.default_rng(0).standard_normal((16, FEATURES, FRAMES)).astype("float32"))
    data = tmp_path / ("sounds.npy" if name == "whisper" else "text.txt")
    arguments = ["compile", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--calib", str(data), "--quiet"]
    assert main([*arguments, *FAST]) == 0
    (tmp_path / "load.py").write_text(PAIR)
    done = subprocess.run(
        [OTHER, str(tmp_path / "load.py"), cls, str(tmp_path / "out"), str(FEATURES), str(FRAMES)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    halves = exported_halves(tmp_path / "out")
    assert halves is not None and (found["class"] == cls or name == "whisper")
    if name != "whisper":
        mine = generate(halves, [0, 5, 7, 4, 9, 6], 8, ends=halves.ends).tokens
        assert [token for token in found["generated"][1:] if token != 2][:len(mine)] == [t for t in mine if t != 2]
