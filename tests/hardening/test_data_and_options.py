"""Data and options beyond reason: one line and exit code 2, before memory or time is taken."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from repquant_fx import limits
from repquant_fx.calibration import images
from repquant_fx.calibration.arrays import read_arrays
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.text import read_text
from repquant_fx.cli import main
from repquant_fx.errors import CalibrationError, InputError
from repquant_fx.evaluation import evaluate, similarity
from repquant_fx.evaluation.similarity import read_pairs

FLOATS = [InputSpec("x", (None, 4), torch.float32)]


@pytest.mark.parametrize("option", [
    "--batch-size=0", "--batch-size=-1", "--batch-size=1e12", "--calib-samples=1000000000000", "--calib-samples=nan",
    "--seq-len=-5", "--seq-len=1000000000000000000000000", "--calib-samples=" + "9" * 5000, "--calib-samples=\u0663"])
def test_counts(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "none.pt", "--out", str(tmp_path / "m.onnx"), option]) == 2
    said = capsys.readouterr().err
    assert option.partition("=")[0] in said and said.count("\n") == 1 and len(said) < 300


@pytest.mark.parametrize(
    "option",
    [
        "--mean-abits=nan",
        "--mean-abits=inf",
        "--mean-abits=1e9",
        "--probes=1000000000",
        "--trials=-1",
        "--target-sqnr=nan",
        "--max-drop=-inf",
        "--max-drop=nan",
        "--limit=0",
    ],
)
def test_numbers_of_a_search(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "none.pt", "--out", str(tmp_path / "r.yaml"), "--target-size", "3b", option]) == 2
    said = capsys.readouterr().err
    assert option.partition("=")[0] in said and "expected a" in said and said.count("\n") == 1


@pytest.mark.parametrize("threads", ["1e9", "1e12", "1000000000000", "100000", "0", "-3", "nan"])
def test_threads(threads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "none.pt", "--data", str(tmp_path), "--threads", threads]) == 2
    assert "--threads" in capsys.readouterr().err
    with pytest.raises(InputError, match="threads"):
        evaluate("none.pt", str(tmp_path), threads=10**5)


def test_values_whose_squares_overflow() -> None:
    with pytest.raises(CalibrationError, match=r"input x has values up to 3e\+38"):
        load_calibration(torch.full((4, 4), -3e38), FLOATS, preprocessing=None)
    mask = [InputSpec("attention_mask", (None, 4), torch.float32)]
    lowest = torch.full((4, 4), torch.finfo(torch.float32).min)
    assert load_calibration(lowest, mask, preprocessing=None).samples == 4


def test_values_just_below_the_limit(tmp_path: Path) -> None:
    """Sums of their squares are near the largest float32."""
    np.save(
        tmp_path / "x.npy", 9e17 * np.sign(np.random.default_rng(0).standard_normal((16, 3, 32, 32))).astype(np.float32)
    )
    options = ["--quiet", "--calib", str(tmp_path / "x.npy"), "--out", str(tmp_path / "m.onnx")]
    assert main(["compile", "timm:vit_tiny_patch16_224,img_size=32,depth=1,embed_dim=24", *options]) == 0


def test_archives_that_unpack_to_more_than_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((1000, 1000), dtype=np.float32))
    assert zipfile.ZipFile(path).infolist()[0].file_size > 100 * path.stat().st_size
    monkeypatch.setattr(limits, "memory", lambda: 10_000_000)
    with pytest.raises(CalibrationError, match="would unpack to"):
        dict(read_arrays(path))  # type: ignore[call-overload]
    np.savez_compressed(path, x=np.zeros((4, 4), dtype=np.float32), large=np.zeros((1000, 1000), dtype=np.float32))
    assert load_calibration(path, FLOATS, preprocessing=None).samples == 4  # the other one is not asked for
    assert tuple(read_arrays(path)) == ("x", "large")


def test_an_array_must_fill_its_entry_of_an_archive(tmp_path: Path) -> None:
    """Memory is taken by what its header says."""
    np.save(tmp_path / "x.npy", np.zeros((4, 4), dtype=np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes().replace(b"(4, 4), ", b"(4, 99),"))
    with pytest.raises(CalibrationError, match="x claims 1584 bytes where 64 are"):
        load_calibration(tmp_path / "a.npz", FLOATS, preprocessing=None)


def test_texts_that_are_larger_than_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda: 100_000)
    (tmp_path / "t.txt").write_text("a" * 2000)
    with pytest.raises(CalibrationError, match="give a part of it"):
        read_text(tmp_path / "t.txt")
    with pytest.raises(CalibrationError, match="give a part of it"):
        read_pairs(tmp_path / "t.txt")


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '["a", "b", ' + "9" * 400 + "]"), ("a.jsonl", '["a", "b", 1e999]'), ("a.jsonl", "[" * 100_000),
    ("a.jsonl", '["a", "b", ' + "9" * 5000 + "]"), ("a.csv", "a,b," + "9" * 400), ("a.csv", "a,b,nan"),
    ("a.csv", "a," + "b" * 200_000 + ",1"), ("a.csv", "a,b\0,1\n\0"), ("a.tsv", "a\tb\tinf")],
    ids=["integer", "exponent", "depth", "digits", "csv", "nan", "field", "null", "inf"])
def test_pairs(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    try:
        found = read_pairs(tmp_path / name)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert all(np.isfinite(pair.score) for pair in found)


def test_scores_whose_squares_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scores of 1e200: their ranks and ratios are what counts."""
    import importlib

    module = importlib.import_module("repquant_fx.evaluation.similarity")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps([f"a{i}", f"b{i}", (i + 1) * 1e200]) for i in range(4)))
    angles = {f"{side}{i}": torch.tensor([1.0, 0.2 * (4 - i) * (side == "b")]) for i in range(4) for side in "ab"}
    monkeypatch.setattr(module, "tokenizer_for", lambda *_: type("T", (), {"pad_token_id": 0}))
    monkeypatch.setattr(module, "sequence_length", lambda *_: 4)
    monkeypatch.setattr(module, "tokenize", lambda _, sentences, **__: sentences)
    monkeypatch.setattr(module, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(module, "embed", lambda _, rows, *__: torch.stack([angles[row] for row in rows]))
    found = similarity(None, tmp_path / "p.jsonl")  # type: ignore[arg-type]
    assert found.spearman == pytest.approx(1) and 0.9 < found.pearson <= 1


def test_pictures_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(images, "_MOST_PIXELS", 100)
    Image.new("L", (11, 10)).save(tmp_path / "a.png")
    found = images.ImageReader(None, (3, 8, 8))(tmp_path / "a.png")
    assert isinstance(found, images.Unreadable) and "11x10 pixels" in found.reason


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    try:
        os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    folder = next(tmp_path.iterdir())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(folder), b"\xe9.png"))
    spec = [InputSpec("x", (None, 3, 8, 8), torch.float32)]
    assert load_calibration(folder, spec, preprocessing=None).samples == 1
    (folder / "bad.png").write_bytes(b"no picture")
    options = ["--quiet", "--calib", str(folder), "--out", str(tmp_path / "m.onnx")]
    assert main(["compile", "timm:vit_tiny_patch16_224,img_size=32,depth=1,embed_dim=24", *options]) == 2
    said = capsys.readouterr().err
    assert "unreadable" in said and said.count("\n") == 1 and said.isascii()
    assert main(["compile", str(folder / "m.pt"), "--out", str(folder / "m.onnx"), "--force"]) == 2
