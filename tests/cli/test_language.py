"""The command line on transformers directories: text in, a checked ONNX file out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import FAST
from language import LINES, VOCABULARY, make, save, tokenizer

from repquant_fx.cli import main
from repquant_fx.runtime import session


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/` with a tokenizer, `opt/` and `bert/` without, `words/` (a tokenizer alone), `text.txt`, `pairs.jsonl`.
    """
    root = tmp_path_factory.mktemp("language")
    save("llama", root / "llama", with_tokenizer=True)
    save("opt", root / "opt")
    save("bert", root / "bert")
    tokenizer().save_pretrained(root / "words")
    (root / "text.txt").write_text("\n".join(LINES * 4))
    (root / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in itertools.pairwise(LINES)))
    return root


def repquant_fx(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "repquant_fx", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_causal_language_model_from_its_directory_and_a_text(place: Path, tmp_path: Path) -> None:
    found = repquant_fx(
        "compile",
        place / "llama",
        "--calib",
        place / "text.txt",
        "--seq-len",
        16,
        "--out",
        tmp_path / "m.onnx",
        "--json",
        "--no-with-past",
        *FAST,
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert found.stderr.count("\n") < 40 and "warning" not in found.stderr
    tokens = len(tokenizer()((place / "text.txt").read_text())["input_ids"])
    assert report["calibration"]["samples"] + report["calibration"]["held_back"] == min(128, tokens // 16)
    assert "windows of at most 16 tokens" in report["calibration"]["origin"] and not report["calibration"]["synthetic"]
    runner, model = session(str(tmp_path / "m.onnx")), make("llama")
    assert [d.dim_param for d in onnx.load(str(tmp_path / "m.onnx")).graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "sequence",
    ]
    stream = torch.tensor(tokenizer()((place / "text.txt").read_text())["input_ids"])
    for batch, length in ((1, 5), (3, 33)):
        ids = stream[:batch * length].reshape(batch, length)
        (logits,) = runner.run(
            ["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones((batch, length), np.int64)}
        )
        expected = model(ids).logits.detach()
        assert logits.shape == (batch, length, VOCABULARY)
        assert float((torch.from_numpy(logits) - expected).norm() / expected.norm()) < 0.2


def test_a_text_of_one_repeated_token(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every channel behind a norm is constant but for rounding, which must not become codes: kernels round each in its
    own way.
    """
    (tmp_path / "text.txt").write_text("the " * 512)
    arguments = ["compile", place / "llama", "--calib", tmp_path / "text.txt", "--seq-len", 16, "--no-with-past",
                 *FAST]
    code = main([*map(str, arguments), "--out", str(tmp_path / "m.onnx")])
    assert code == 0, capsys.readouterr().err


@pytest.mark.slow
def test_ids_at_padded_positions_do_not_change_the_file(place: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    mask = (np.arange(8) < generator.integers(2, 8, (16, 1))).astype(np.int64)
    ids, files = generator.integers(3, VOCABULARY, mask.shape), []
    for filler in (2, 70):
        np.savez(tmp_path / "ids.npz", input_ids=np.where(mask, ids, filler), attention_mask=mask)
        out, data = tmp_path / f"{filler}.onnx", str(tmp_path / "ids.npz")
        assert main(["compile", str(place / "bert"), "--calib", data, "--out", str(out), *FAST]) == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_an_encoder_with_the_tokenizer_of_another_directory_and_pairs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "compile",
            str(place / "bert"),
            "--calib",
            str(place / "pairs.jsonl"),
            "--tokenizer",
            str(place / "words"),
            "--calib-samples",
            "20",
            "--out",
            str(tmp_path / "m.onnx"),
            "--json",
            *FAST,
        ]
    )
    found = capsys.readouterr()
    assert code == 0, found.err
    report = json.loads(found.out)
    assert (
        report["calibration"]["samples"] + report["calibration"]["held_back"] == 20
        and "lines" in report["calibration"]["origin"]
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["llama", "--task", "summarization"], ["invalid choice: 'summarization'", "causal-lm"]),
        (["llama", "--task", "image-classification"], ["cannot do image-classification", "causal-lm"]),
        (["llama", "--task", "text-classification"], ["score.weight", "--task"]),
        (["opt", "--calib", "text.txt"], ["--tokenizer DIR"]),
        (["opt", "--calib", "text.txt", "--tokenizer", "bert"], ["no tokenizer in"]),
        (["llama", "--calib", "empty.txt"], ["is empty"]),
        (["llama", "--calib", "short.txt"], ["less than one sequence of 64", "--seq-len"]),
        (["llama", "--calib", "foreign.npz"], ["no array for the inputs input_ids"]),
        (["llama", "--calib", "large.npz"], ["vocabulary"]),
        (["llama", "--seq-len", "0"], ["--seq-len", "at least 1"]),
        (["llama", "--seq-len", "65"], ["--seq-len 65", "1 to 64"]),
        (["llama", "--arch", "timm:vit_tiny_patch16_224"], ["--arch"]),
        (["words"], ["not a model file", "without config.json"]),
        (["custom"], ["code of its own", "auto_map"]),
        (["timm:vit_tiny_patch16_224,depth=1", "--seq-len", "8"], ["takes no token ids"]),
    ],
)
def test_bad_input(
    arguments: list[str], words: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("the fox")
    np.savez(tmp_path / "foreign.npz", tokens=np.zeros((2, 4), np.int64), padding=np.ones((2, 4), np.int64))
    np.savez(tmp_path / "large.npz", input_ids=np.full((2, 4), VOCABULARY))
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "code.X"}}')
    given = [
        str(folder / a) if (folder := next((f for f in (place, tmp_path) if (f / a).exists()), None)) else a
        for a in arguments
    ]
    assert main(["compile", *given, "--out", str(tmp_path / "m.onnx"), *FAST]) == 2
    found = capsys.readouterr()
    assert (
        found.err.count("error:") == 1
        and "Traceback" not in found.err
        and found.out == ""
        and not (tmp_path / "m.onnx").exists()
    )
    assert all(word in found.err for word in words), found.err
