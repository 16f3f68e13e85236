"""Perplexity and similarity: against the formulas, computed directly, and the same for a torch model and its ONNX file.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from language import LENGTH, LINES, make, save, tokenizer

from repquant_fx import Recipe, compile
from repquant_fx.cli import main
from repquant_fx.errors import InputError
from repquant_fx.evaluation import evaluate

TEXT = " ".join(LINES[:12])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    save("llama", root / "llama", with_tokenizer=True)
    (root / "text.txt").write_text(TEXT)
    (root / "documents.txt").write_text("#".join(LINES[:3]))
    with (root / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([LINES[i], LINES[-1 - i], (i * 7) % 5] for i in range(12))
    return root


def nats(ids: torch.Tensor, first: int) -> float:
    """Negative log-likelihood of tokens `first` and later, in one window."""
    with torch.no_grad():
        logits = make("llama")(ids[None]).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits[first - 1:-1], ids[first:], reduction="sum"))


def test_one_window_a_document(place: Path) -> None:
    found = evaluate(str(place / "llama"), str(place / "documents.txt"), separator="#", seq_len=LENGTH)
    documents = [torch.tensor(tokenizer()(line)["input_ids"]) for line in LINES[:3]]
    whole = [
        ids if int(ids[0]) == tokenizer().bos_token_id else torch.cat([torch.tensor([tokenizer().bos_token_id]), ids])
        for ids in documents
    ]
    expected = sum(nats(ids, 1) for ids in whole) / sum(len(ids) - 1 for ids in whole)
    assert found.documents == 3 and found.tokens == sum(len(ids) - 1 for ids in whole)
    assert found.nats_per_token == pytest.approx(expected, rel=1e-5) and found.perplexity == pytest.approx(
        math.exp(expected), rel=1e-5
    )


def test_every_token_is_scored_once_whatever_the_stride(place: Path) -> None:
    whole = evaluate(str(place / "llama"), str(place / "text.txt"), seq_len=32, stride=16)
    finer = evaluate(str(place / "llama"), str(place / "text.txt"), seq_len=32, stride=8)
    assert whole.tokens == finer.tokens > 32 and whole.nats_per_token != finer.nats_per_token


def test_torch_and_onnx_runtime_alike(place: Path, tmp_path: Path) -> None:
    """An 8-bit file measures near its float source, by the same code."""
    compiled = compile(
        place / "llama",
        recipe=Recipe(gptq=False),
        calibration=str(place / "text.txt"),
        seq_len=16,
        samples=16,
        batch_size=8,
        with_past=False,
    )
    compiled.save(tmp_path / "m.onnx")
    options = {"seq_len": 32, "stride": 16}
    source = evaluate(str(place / "llama"), str(place / "text.txt"), **options)
    exported = evaluate(str(tmp_path / "m.onnx"), str(place / "text.txt"), tokenizer=str(place / "llama"), **options)
    assert exported.tokens == source.tokens and exported.nats_per_token == pytest.approx(source.nats_per_token, rel=0.1)
    with pytest.raises(InputError, match="tokenizer"):
        evaluate(str(tmp_path / "m.onnx"), str(place / "text.txt"))


def test_similarity_is_the_rank_correlation_of_cosines(tmp_path: Path, place: Path) -> None:
    import transformers as t
    from helpers import redraw
    from language import TEXT as SIZES

    torch.manual_seed(0)
    model = redraw(t.BertModel(t.BertConfig(**SIZES)))
    model.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    found = evaluate(str(tmp_path / "bert"), str(place / "pairs.csv"))
    rows = list(csv.reader((place / "pairs.csv").open()))
    cosines = []
    for first, second, _ in rows:
        with torch.no_grad():
            a, b = (
                model(**tokenizer()([text], return_tensors="pt", return_token_type_ids=False)).last_hidden_state.mean(
                    1
                )[0]
                for text in (first, second)
            )
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
    from scipy.stats import spearmanr

    assert found.pairs == 12 and found.spearman == pytest.approx(
        float(spearmanr(cosines, [float(r[2]) for r in rows]).statistic), abs=0.03
    )
    assert not np.isnan(found.pearson)


def test_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(place / "llama"), "--data", str(place / "text.txt"), "--seq-len", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert (
        main(
            [
                "evaluate",
                str(place / "llama"),
                "--data",
                str(place / "text.txt"),
                "--prompts",
                "a {}",
                "--metric",
                "perplexity",
            ]
        )
        == 2
    )
    assert "--prompts" in capsys.readouterr().err
