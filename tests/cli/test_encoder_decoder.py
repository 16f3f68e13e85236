"""Encoder-decoders from directory to text: two files, what lies beside them, and what reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from compiled import compiled
from helpers import FAST
from language import LINES, tokenizer
from seq2seq import FEATURES, FRAMES, save

from repquant_fx import files
from repquant_fx.encoder_decoder import CompiledHalves
from repquant_fx.errors import OutputError
from repquant_fx.parity import sqnr

PROMPT, TOKENS = "the red fox sees", 8


def arguments(folder: Path, name: str, data: str, *more: object) -> list[str]:
    given = ("compile", folder / name, "--out", folder / "out", "--calib", folder / data, "--batch-size", 64, "--quiet")
    return [str(each) for each in (*given, *FAST, *more)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`t5/`, what is compiled of it in `out/`, and `text.txt`."""
    from repquant_fx.cli import main

    root = tmp_path_factory.mktemp("pair")
    save("t5", root / "t5")
    (root / "text.txt").write_text("\n".join(LINES))
    assert main(arguments(root, "t5", "text.txt", "--report", root / "report.json")) == 0
    return root


def sessions(folder: Path) -> tuple[Any, Any]:
    providers = ["CPUExecutionProvider"]
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}_model.onnx", providers=providers)
                        for name in ("encoder", "decoder"))
    return encoder, decoder


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def greedy(folder: Path, start: int, **read: np.ndarray) -> list[int]:
    """Token by token, with the two files alone."""
    encoder, decoder = sessions(folder)
    (hidden,) = encoder.run(["last_hidden_state"], read)
    told = {"encoder_hidden_states": hidden}
    if "attention_mask" in read:
        told["encoder_attention_mask"] = read["attention_mask"]
    ids = [start]
    for _ in range(TOKENS):
        (logits,) = decoder.run(["logits"], {"input_ids": np.array([ids]), **told})
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return ids[1:]


def test_the_directory(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "out").glob("*.onnx")) == ["decoder_model.onnx", "encoder_model.onnx"]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in (folder / "out").iterdir()}
    encoder, decoder = sessions(folder / "out")
    assert names(encoder.get_inputs()) == ["input_ids", "attention_mask"]
    assert names(encoder.get_outputs()) == ["last_hidden_state"]
    assert names(decoder.get_inputs()) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    assert names(decoder.get_outputs()) == ["logits"]
    shapes = [value.shape for value in decoder.get_inputs()]
    assert shapes[0][1] != shapes[1][1] and shapes[1][:2] == shapes[2][:2]  # lengths of their own


def test_the_report_has_both(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert list(report) == ["encoder", "decoder"]
    assert "what the float model writes" in report["decoder"]["calibration"]["origin"]
    assert all(half["calibration"]["samples"] == 56 and half["output_sqnr_db"] > 15 for half in report.values())


def test_both_together_are_near_the_float_model(folder: Path) -> None:
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "t5").eval()
    read = tokenizer()(LINES[:6], return_tensors="pt", padding=True)
    given = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}
    target = model.generate(**given, max_new_tokens=11, do_sample=False, num_beams=1)
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=target).logits
    encoder, decoder = sessions(folder / "out")
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    (hidden,) = encoder.run(None, arrays)
    (logits,) = decoder.run(None, {"input_ids": target.numpy(), "encoder_attention_mask": arrays["attention_mask"],
                                   "encoder_hidden_states": hidden})
    assert sqnr(torch.from_numpy(logits), expected) > 15


def test_inspect_takes_one_of_them(folder: Path, cli: Any) -> None:
    found = cli("inspect", folder / "out")
    assert found.code == 2 and "one by one" in found.err and found.err.count("\n") == 1
    found = cli("inspect", folder / "out" / "decoder_model.onnx", "--json")
    assert any(row["site"].startswith("decoder.block.0.layer.1.EncDecAttention") for row in found.json["rows"])


def test_generate(folder: Path, cli: Any) -> None:
    found = cli("generate", folder / "out", PROMPT, "--tokens", TOKENS, "--threads", 1, "--json")
    assert found.code == 0, found.err
    read = tokenizer()(PROMPT, return_tensors="np")
    expected = greedy(folder / "out", 2, **{name: read[name] for name in ("input_ids", "attention_mask")})
    assert found.json["model"]["tokens"] == expected
    assert PROMPT not in found.json["model"]["text"]


def test_generate_says_what_is_missing(folder: Path, cli: Any) -> None:
    assert "--beside" in cli("generate", folder / "out", PROMPT, "--beside", folder / "t5").err
    (folder / "bare").mkdir()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        (folder / "bare" / name).write_bytes((folder / "out" / name).read_bytes())
    found = cli("generate", folder / "bare", PROMPT, "--tokenizer", folder / "t5")
    assert found.code == 2 and "decoder_start_token_id" in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("more, words", [
    (["--out", "{}/model.onnx"], "give a directory"),
    (["--out", "{}/new", "--html", "{}/page.html"], "--html is a page of one file"),
    (["--out", "{}/new", "--with-past"], "--with-past"),
    (["--out", "{}/out"], "encoder_model.onnx exists"),
])
def test_refused_before_the_work(more: list[str], words: str, folder: Path, cli: Any) -> None:
    found = cli("compile", folder / "t5", "--calib", folder / "none.txt", *(each.format(folder) for each in more))
    assert found.code == 2 and words in found.err and found.err.count("\n") == 1
    assert not (folder / "model.onnx").exists() and not (folder / "new").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_both_files_or_none(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, out, write = CompiledHalves(compiled("vit", 8), compiled("vit", 4)), tmp_path / "out", files._write

    def full(path: Path, data: files.Content) -> None:
        if path.name == "decoder_model.onnx":
            raise OSError(28, "No space left on device")
        write(path, data)

    if existing:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(OutputError, match="No space left"):
            pair.save(out, report=tmp_path / "report.json")
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if existing else [])
    pair.save(out, report=out / "report.json")
    assert {"encoder_model.onnx", "decoder_model.onnx", "report.json"} <= {path.name for path in out.iterdir()}
    with pytest.raises(OutputError, match="exists; pass --force"):
        pair.save(out)


@pytest.mark.slow
def test_bart(tmp_path: Path, cli: Any) -> None:
    save("bart", tmp_path / "bart")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    assert cli(*arguments(tmp_path, "bart", "text.txt")).code == 0
    found = cli("generate", tmp_path / "out", PROMPT, "--tokens", TOKENS, "--json")
    read = tokenizer()(PROMPT, return_tensors="np")
    expected = greedy(tmp_path / "out", 3, **{name: read[name] for name in ("input_ids", "attention_mask")})
    assert found.json["model"]["tokens"] == expected


@pytest.mark.slow
def test_whisper_in_a_process_of_its_own(tmp_path: Path) -> None:
    save("whisper", tmp_path / "whisper")
    sounds = np.random.default_rng(0).standard_normal((32, FEATURES, FRAMES)).astype(np.float32)
    np.save(tmp_path / "sounds.npy", sounds)
    done = subprocess.run([sys.executable, "-m", "repquant_fx", *arguments(tmp_path, "whisper", "sounds.npy")],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "image processor" not in done.stderr, done.stderr
    assert names(sessions(tmp_path / "out")[1].get_inputs()) == ["input_ids", "encoder_hidden_states"]
    assert len(greedy(tmp_path / "out", 3, input_features=sounds[:1])) > 0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
