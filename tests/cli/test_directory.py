"""`--out DIR`: a directory that loads by itself."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAST
from language import LINES, make, save, tokenizer
from pictures import ARCH

from repquant_fx import compile
from repquant_fx.cli import main
from repquant_fx.errors import OutputError
from repquant_fx.files import check_directory, write_directory
from repquant_fx.runtime import session


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def close(found: np.ndarray, expected: torch.Tensor, bound: float = 0.2) -> bool:
    return float((torch.from_numpy(found) - expected).norm() / expected.norm()) < bound


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("directories")
    save("bert", root / "bert", with_tokenizer=True, max_shard_size="5KB")
    save("vit", root / "vit")
    (root / "text.txt").write_text("\n".join(LINES))
    (root / "vit" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 16, "width": 16},
                "image_mean": [0.4] * 3,
                "image_std": [0.3] * 3,
            }
        )
    )
    return root


def test_a_text_model_with_its_tokenizer(place: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "bert-int8"
    arguments = [
        "compile",
        str(place / "bert"),
        "--calib",
        str(place / "text.txt"),
        "--out",
        f"{out}/",
        "--report",
        str(out / "report.json"),
    ]
    found = cli(*arguments, "--json", *FAST)
    assert found.code == 0, found.err
    assert found.json["out"] == str(out / "model.onnx") and names(tmp_path) == {"bert-int8"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx", "report.json"} <= names(out)
    assert not any("safetensors" in name for name in names(out))  # neither weights nor their index
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(out).model_type == "bert"
    encoded = AutoTokenizer.from_pretrained(out)(LINES[:3], padding=True, return_tensors="pt")
    feed = {name: encoded[name].numpy() for name in ("input_ids", "attention_mask")}
    (logits,) = session(out / "model.onnx").run(["logits"], feed)
    assert close(logits, make("bert")(**{k: torch.from_numpy(v) for k, v in feed.items()}).logits.detach())
    assert json.loads((out / "report.json").read_text())["file_bytes"] == (out / "model.onnx").stat().st_size


def test_an_image_model_with_its_processor(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compile", str(place / "vit"), "--calib-samples", "8", "--out", str(tmp_path / "vit"), "--quiet", *FAST])
        == 0
    )
    from transformers import AutoImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "vit")(picture, return_tensors="pt")["pixel_values"]
    (logits,) = session(tmp_path / "vit" / "model.onnx").run(None, {"pixel_values": pixels.numpy()})
    assert close(logits, make("vit")(pixels).logits.detach())


def test_a_timm_model_says_how_images_are_prepared(tmp_path: Path) -> None:
    assert main(["compile", ARCH, "--calib-samples", "8", "--out", str(tmp_path / "timm"), "--quiet", *FAST]) == 0
    assert main(["inspect", str(tmp_path / "timm")]) == 0
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["architecture"] == "vit_tiny_patch16_224" and about["num_classes"] == 5
    from timm.data import create_transform

    transform = create_transform(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in about["pretrained_cfg"].items()}, is_training=False
    )
    from PIL import Image

    x = transform(Image.new("RGB", (30, 20)))[None].numpy()
    (logits,) = session(tmp_path / "timm" / "model.onnx").run(None, {"x": x})
    assert logits.shape == (1, 5)


def test_a_model_in_memory_with_a_tokenizer(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "memory"
    result = compile(make("bert"), str(place / "text.txt"), samples=8, tokenizer=tokenizer(), check=False)
    assert result.save(out) == out / "model.onnx" and {"config.json", "tokenizer.json", "model.onnx"} <= names(out)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out)(LINES[0])["input_ids"] == tokenizer()(LINES[0])["input_ids"]
    with pytest.raises(OutputError, match="--force"):
        result.save(out)


def test_any_other_model_comes_alone(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    compile(model, torch.randn(8, 8), example_inputs=(torch.randn(2, 8),)).save(tmp_path / "out")
    assert names(tmp_path / "out") == {"model.onnx"}


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_an_existing_directory_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    (tmp_path / "b").write_text("old")
    with pytest.raises(OutputError, match="--force"):
        check_directory(tmp_path, ["a", "b"], False)
    write_directory(check_directory(tmp_path, ["a", "b"], True), {"a": b"1", "b": b"2"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"note": "mine", "a": "1", "b": "2"}


@pytest.mark.parametrize("exists", [False, True])
def test_all_or_nothing(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the second file."""
    import repquant_fx.files as module

    out, real, written = tmp_path / "out", module._write, []
    if exists:
        out.mkdir()
        (out / "a").write_text("old")

    def full(path: Path, data: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, "no space left")
        written.append(path)
        real(path, data)
    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OutputError):
        write_directory(out, {"a": b"1", "b": b"2"})
    assert names(tmp_path) == ({"out"} if exists else set()) and (not exists or (out / "a").read_text() == "old")


@pytest.mark.parametrize("target", ["missing/out", "file", "file/out"])
def test_refused_before_anything_is_loaded(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["compile", "no such model", "--out", str(tmp_path / target), "--force"]) == 2
    assert "cannot write" in capsys.readouterr().err and names(tmp_path) == {"file"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.onnx").write_text("mine")
    assert (
        main(["compile", "no such model", "--out", str(tmp_path / "full")]) == 2
        and "--force" in capsys.readouterr().err
    )
