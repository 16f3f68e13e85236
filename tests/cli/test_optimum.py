"""`--out DIR` under optimum's ONNX Runtime classes.

optimum needs an older transformers than ours, so it lives in an environment of its own: OPTIMUM_PYTHON names its
interpreter (`python -m venv there; there/bin/pip install 'optimum-onnx[onnxruntime]' torch`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import FAST
from language import LINES, save

from repquant_fx.cli import main
from repquant_fx.generation import exported_runner, generate

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
