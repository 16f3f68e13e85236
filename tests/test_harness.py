"""Tasks of lm_eval: scores by the formulas, and the harness itself on a task in a local file, where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import FAST
from language import LINES, make, save, tokenizer

from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.cli import main
from repquant_fx.errors import InputError
from repquant_fx.evaluation.harness import continue_text, cut, score, score_rows
from repquant_fx.evaluation.runners import Runner, open_runner
from repquant_fx.options import Source

TASK = """
task: who_sees
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    save("llama", root / "llama", with_tokenizer=True)
    return root


@pytest.fixture(scope="module")
def runner(place: Path) -> Runner:
    return open_runner(Source(str(place / "llama"), task="causal-lm"))


def expected(tokens: list[int], count: int) -> float:
    with torch.no_grad():
        chances = make("llama")(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(chances[i - 1, tokens[i]]) for i in range(len(tokens) - count, len(tokens)))


def test_a_score_is_the_log_probability(runner: Runner) -> None:
    rows = [([3, 5, 7, 9], 2), ([4, 6], 1), ([3, 5, 7, 11], 3), ([0, 8, 2, 6, 9], 1)]
    for batch_size in (1, 4):
        found = score_rows(runner, rows, batch_size)
        assert [value for value, _ in found] == pytest.approx([expected(*row) for row in rows], rel=1e-5)
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert score(logits, torch.tensor([1, 0]))[1] and not score(logits, torch.tensor([1, 1]))[1]
    with pytest.raises(InputError, match="NaN"):
        score(logits * float("nan"), torch.tensor([1, 0]))


def test_long_texts_lose_their_beginning() -> None:
    assert cut([1, 2, 3], [4, 5], 9) == ([1, 2, 3, 4, 5], 2)
    assert cut([1, 2, 3], [4, 5], 3) == ([3, 4, 5], 2)
    assert cut([1], [2, 3, 4], 3) == ([2, 3, 4], 2)


def test_a_text_goes_on_until_a_stop() -> None:
    """A model that counts: after each token comes the next number."""
    takes = InputSpec("input_ids", (None, None), torch.int64)

    def count(feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": torch.nn.functional.one_hot(feed["input_ids"] + 1, 40).float()}

    counting = Runner(count, (takes,), ("batch",), "a model that counts")
    words = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    assert continue_text(counting, words, [1, 5], [], 4, -1) == "6 7 8 9"
    assert continue_text(counting, words, [1, 5], ["x", " 8"], 4, -1) == "6 7"
    assert continue_text(counting, words, [1, 5], [], 4, 8) == "6 7"


def test_what_is_missing_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", str(place / "llama"), "--tasks", "piqa"]) == 2
    assert "pip install 'repquant-fx[tasks]'" in capsys.readouterr().err
    assert main(["lm-eval", str(place / "llama"), "--tasks", ","]) == 2


def test_the_harness_scores_a_file(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The right answer is what the float model finds likelier."""
    pytest.importorskip("lm_eval", reason="pip install 'repquant-fx[tasks]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    runner, words = open_runner(Source(str(place / "llama"), task="causal-lm")), tokenizer()
    rows = []
    for first, second in zip(LINES[:8], LINES[40:48]):
        question, *ends = first.rsplit(" ", 2)[0], *(" " + line.rsplit(" ", 2)[1] for line in (first, second))
        encoded = [words(question + end)["input_ids"] for end in ends]
        scores = [value for value, _ in score_rows(runner, [(ids, 1) for ids in encoded], 1)]
        choices = [end.strip() for end in ends]
        rows.append({"question": question, "choices": choices, "label": scores.index(max(scores))})
    (place / "tasks").mkdir(exist_ok=True)
    data = place / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (place / "tasks/who.yaml").write_text(TASK.format(data=data))
    common = ["--tasks", "who_sees", "--include", str(place / "tasks"), "--json"]
    assert main(["lm-eval", str(place / "llama"), *common]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["who_sees"]["acc"] == 1
    (place / "text.txt").write_text("\n".join(LINES))
    assert main(["compile", str(place / "llama"), "--out", str(place / "out"), "--calib", str(place / "text.txt"),
                 "--seq-len", "16", *FAST]) == 0
    capsys.readouterr()
    assert main(["lm-eval", str(place / "out/model.onnx"), *common, "--limit", "6", "--batch-size", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["who_sees"]["acc"] > 0.6
    assert main(["lm-eval", str(place / "llama"), "--tasks", "no_such_task"]) == 2
    assert "lm_eval has no task no_such_task" in capsys.readouterr().err
