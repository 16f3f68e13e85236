"""From a directory to text: compile --with-past, generate, evaluate, and the peers that load what was written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import FAST
from language import LINES, save, tokenizer
from torch import Tensor

from repquant_fx.evaluation.decoder import Decoder
from repquant_fx.evaluation.perplexity import prefix_of

PROMPT = "the red fox sees"
GENAI = importlib.util.find_spec("onnxruntime_genai") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`opt/`, what is compiled of it in `out/`, and `text.txt`."""
    from repquant_fx.cli import main

    root = tmp_path_factory.mktemp("decoding")
    save("opt", root / "opt", with_tokenizer=True)
    (root / "text.txt").write_text("\n".join(LINES))
    arguments = ["compile", root / "opt", "--out", root / "out", "--calib", root / "text.txt",
                 "--seq-len", 16, "--quiet", *FAST]
    assert main([str(a) for a in arguments]) == 0
    return root


def generated(cli: Any, folder: Path, *arguments: object) -> Any:
    return cli("generate", folder / "out", PROMPT, "--tokens", 8, "--threads", 1, *arguments)


def test_generate(folder: Path, cli: Any) -> None:
    found = generated(cli, folder)
    assert found.code == 0, found.err
    assert found.out.startswith("model: ") and "tokens per second" in found.out and PROMPT in found.out
    first, second = (generated(cli, folder, "--temperature", 3, "--seed", seed, "--json").json for seed in (1, 2))
    assert first["model"]["text"] != second["model"]["text"] and len(first["model"]["tokens"]) <= 8


@pytest.mark.slow
def test_generate_beside_float(folder: Path, cli: Any) -> None:
    found = generated(cli, folder, "--beside", folder / "opt", "--json")
    assert found.code == 0, found.err
    assert {"text", "tokens_per_second"} <= found.json["float"].keys()


def test_evaluate_scores_through_the_cache(folder: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Recording(Decoder):
        def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            lengths.append(ids.shape[1])
            return super().__call__(ids, mask)

    monkeypatch.setattr(sys.modules[prefix_of.__module__], "Decoder", Recording)
    found = cli("evaluate", folder / "out" / "model.onnx", "--data", folder / "text.txt",
                "--limit", 3, "--seq-len", 16, "--json")
    assert found.code == 0 and 1 < found.json["perplexity"] < 1e6
    assert lengths[-6:] == [8] * 6  # each window in two halves


def test_what_the_directory_says_to_onnxruntime_genai(folder: Path) -> None:
    model = json.loads((folder / "out" / "genai_config.json").read_text())["model"]
    assert model["decoder"]["filename"] == "model.onnx" and model["vocab_size"] == 80
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (2, 8)


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
def test_onnxruntime_genai_gives_the_same_tokens(folder: Path, cli: Any) -> None:
    import numpy as np
    import onnxruntime_genai as genai

    words = tokenizer()
    prompt = prefix_of(words) + words(PROMPT, add_special_tokens=False)["input_ids"]
    model = genai.Model(str(folder / "out"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 8, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][len(prompt):]
    assert found == generated(cli, folder, "--json").json["model"]["tokens"][:len(found)] and len(found) > 1


def test_bad_input(folder: Path, cli: Any) -> None:
    for arguments, words in (
        (("generate", folder / "opt", PROMPT), "no exported model"),
        (("generate", folder / "none", PROMPT), "no exported model"),
        (("generate", folder / "out", PROMPT, "--tokens", 0), "--tokens"),
        (("generate", folder / "out", PROMPT, "--temperature", "-1"), "--temperature"),
    ):
        found = cli(*arguments)
        assert found.code == 2 and words in found.err and found.out == ""
