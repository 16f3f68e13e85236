"""CIFAR-100 in its authors' binary format to class folders, and CLIP zero-shot on them, float and compiled."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import cifar100
import numpy as np
import pytest
from helpers import FAST
from language import LENGTH, VOCABULARY, save

from repquant_fx.cli import main

NAMES = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]


def write(path: Path, labels: list[int], names: list[str] = NAMES) -> Path:
    """An archive as it is published, of smooth pictures."""
    generator = np.random.default_rng(0)
    rows = b"".join(bytes([0, label]) + generator.integers(0, 256, (3, 4, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
                    .tobytes() for label in labels)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("fine_label_names.txt", "\n".join(names).encode() + b"\n"), ("test.bin", rows)):
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_pictures_come_to_the_folders_of_their_classes(tmp_path: Path) -> None:
    from PIL import Image

    assert cifar100.unpack(write(tmp_path / "c.tar.gz", [3, 99, 3]), "test", tmp_path / "out") == 3
    assert len(list((tmp_path / "out").iterdir())) == 100
    assert sorted(p.name for p in (tmp_path / "out" / NAMES[3]).iterdir()) == ["00000.png", "00002.png"]
    first = np.asarray(Image.open(tmp_path / "out" / NAMES[3] / "00000.png"))
    expected = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    assert first.shape == (32, 32, 3) and (first[::8, ::8] == expected.transpose(1, 2, 0)).all()
    with pytest.raises(SystemExit, match=r"no train\.bin"):
        cifar100.unpack(tmp_path / "c.tar.gz", "train", tmp_path / "out")
    with pytest.raises(SystemExit, match="not the binary version"):
        cifar100.unpack(write(tmp_path / "d.tar.gz", [1], ["../x"] * 100), "test", tmp_path / "out")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clip_on_the_folders(
    compiled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels are what the float model sees."""
    from repquant_fx.evaluation.classification import accuracy_of

    save("clip", tmp_path / "clip", with_tokenizer=True)
    seen: list[int] = []

    def noted(predict: Any, images: Any) -> Any:
        def remembering(batch: Any) -> Any:
            outputs = predict(batch)
            seen.extend(outputs.argmax(1).tolist())
            return outputs
        return accuracy_of(remembering, images)

    monkeypatch.setattr(sys.modules["repquant_fx.evaluation.zero_shot"], "accuracy_of", noted)
    prompts = tmp_path / "prompts.json"  # of words that the tokenizer knows; CLIP reads a text at its end
    words = ["fox", "cat", "owl", "boat", "tree", "house", "rain", "sun", "red", "old"]
    prompts.write_text(json.dumps({name: [f"the {words[i % 10]} </s>", f"{words[i // 10]} sees a {words[i % 10]} </s>"]
                                   for i, name in enumerate(NAMES)}))
    command = ["evaluate", str(tmp_path / "clip"), "--data", str(tmp_path / "one"), "--prompts", str(prompts), "--json"]
    cifar100.unpack(write(tmp_path / "one.tar.gz", [0] * 24), "test", tmp_path / "one")
    assert main(command) == 0 and len(seen) == 24
    cifar100.unpack(write(tmp_path / "two.tar.gz", list(seen)), "test", tmp_path / "two")
    command[3] = str(tmp_path / "two")
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 100
    if not compiled:
        return
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "pairs.npz", input_ids=generator.integers(3, VOCABULARY, (16, LENGTH // 4)),
             pixel_values=generator.standard_normal((16, 3, 16, 16), dtype=np.float32))
    assert main(["compile", str(tmp_path / "clip"), "--out", str(tmp_path / "out"), "--calib",
                 str(tmp_path / "pairs.npz"), *FAST]) == 0
    command[1] = str(tmp_path / "out/model.onnx")
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["top1"] > 50
