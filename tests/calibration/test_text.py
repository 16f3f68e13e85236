"""Text and named tensors as calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from language import LINES, tokenizer
from safetensors.torch import save_file

from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.calibration.text import Tokenization, encode, read_text
from repquant_fx.errors import CalibrationError, RepQuantWarning

IDS = InputSpec("input_ids", (None, None), torch.int64, below=80, longest=64)
MASK = InputSpec("attention_mask", (None, None), torch.int64)
IMAGE = InputSpec("pixel_values", (None, 3, 4, 4), torch.float32)
NAMES = ["ids.pt", "ids.npz", "ids.safetensors"]


def load(spec: object, *inputs: InputSpec, text: Tokenization | None = None, **options: int) -> CalibrationSet:
    return load_calibration(spec, inputs or (IDS, MASK), preprocessing=None, text=text, **options)


def write(path: Path, **arrays: torch.Tensor) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        torch.save(arrays, path)
    else:
        save_file(arrays, path)
    return path


def ids(count: int = 6, length: int = 5) -> torch.Tensor:
    return torch.arange(count * length).reshape(count, length)


def rows(found: CalibrationSet, column: int = 0) -> list[list[int]]:
    return torch.cat([batch[column] for batch in found.batches]).tolist()


# ---- named tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tensors_go_to_the_inputs_of_their_names(name: str, tmp_path: Path) -> None:
    mask = (ids() % 4 > 0).long()
    path = write(tmp_path / name, attention_mask=mask, token_type_ids=torch.zeros_like(mask), input_ids=ids())
    found = load(path)
    assert sorted(rows(found)) == ids().tolist()
    for row, kept in zip(rows(found), rows(found, 1)):
        assert kept == [int(i % 4 > 0) for i in row]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_mask_becomes_ones(name: str, tmp_path: Path) -> None:
    found = load(write(tmp_path / name, input_ids=ids(), labels=torch.arange(6)))
    assert sorted(rows(found)) == ids().tolist() and rows(found, 1) == [[1] * 5] * 6


def test_a_single_array_is_the_ids_whatever_it_is_called(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", ids().numpy())
    for spec in (tmp_path / "tokens.npy", ids(), {"tokens": ids()}, write(tmp_path / "a.safetensors", tokens=ids())):
        found = load(spec)
        assert sorted(rows(found)) == ids().tolist() and rows(found, 1) == [[1] * 5] * 6


def test_three_inputs_by_name(tmp_path: Path) -> None:
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 4, 4).contiguous()
    found = load(write(tmp_path / "all.safetensors", pixel_values=images, input_ids=ids()), IDS, MASK, IMAGE)
    # samples stay together
    assert [row[0] // 5 for row in rows(found)] == [int(row[0][0][0]) for row in rows(found, 2)]


@pytest.mark.parametrize("arrays, words", [
    ({"input_ids": ids(), "padding_mask": ids()}, ["no array for the inputs attention_mask", "padding_mask"]),
    ({"words": ids(), "marks": ids(), "more": ids()}, ["no array for the inputs input_ids", "words"]),
    ({"words": ids(), "marks": ids()}, ["no array for the inputs input_ids", "words"]),
    ({"input_ids": ids() + 60}, ["the id 89", "vocabulary ends at 79"]), ({"input_ids": ids() - 1}, ["the id -1"]),
    ({"input_ids": ids(1, 70)}, ["70 tokens", "at most 64"]), ({"input_ids": ids().float()}, ["expects dtype int64"]),
    ({"input_ids": ids(), "attention_mask": torch.ones(5, 5, dtype=torch.int64)}, ["different numbers of samples"]),
])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit(name: str, arrays: dict[str, torch.Tensor], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(write(tmp_path / name, **arrays))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ids_without_the_images_they_go_with(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no array for the inputs .*pixel_values"):
        load(write(tmp_path / "x.npz", input_ids=ids()), IDS, MASK, IMAGE)


def test_made_up_text_spans_the_vocabulary_at_the_asked_length() -> None:
    with pytest.warns(RepQuantWarning, match="random tokens"):
        found = load(None, text=Tokenization(None, 11, True), samples=40)
    values = torch.tensor(rows(found))
    assert (
        values.shape == (40, 11)
        and int(values.min()) >= 0
        and 60 < int(values.max()) < 80
        and rows(found, 1) == [[1] * 11] * 40
    )


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    return path


def causal(length: int = 8) -> Tokenization:
    return Tokenization(tokenizer(), length, True)


def test_windows_are_the_running_text_each_token_once(story: Path) -> None:
    stream = tokenizer()(story.read_text())["input_ids"]
    found = encode(story, causal(8), 3, 0)
    assert found["input_ids"].dtype == torch.int64 and bool((found["attention_mask"] == 1).all())
    assert found["input_ids"].flatten().tolist() == stream[:len(stream) // 8 * 8]


def test_windows_are_chosen_by_the_seed(story: Path) -> None:
    first, same, other = (rows(load(story, text=causal(), samples=5, seed=seed)) for seed in (1, 1, 2))
    assert first == same != other and len(first) == 5
    assert len({tuple(row) for row in rows(load(story, text=causal(), samples=10_000))}) > 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_lines_are_padded_to_the_longest_on_the_tokenizers_side(side: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("the fox\n\n   \nthe old cat in the rain\n")
    words = tokenizer(side)
    found = encode(path, Tokenization(words, 64, False), 10, 0)
    assert found["input_ids"].shape == (2, 7) == found["attention_mask"].shape
    for row, mask in zip(found["input_ids"].tolist(), found["attention_mask"].tolist()):
        kept = [i for i, m in zip(row, mask) if m]
        assert words.decode(kept, skip_special_tokens=True) in ("the fox", "the old cat in the rain")
        assert mask == sorted(mask, reverse=side == "right") and all(
            i == words.pad_token_id for i, m in zip(row, mask) if not m
        )


def test_long_lines_are_cut_and_lines_are_chosen_by_the_seed(story: Path) -> None:
    first, same, other = (
        encode(story, Tokenization(tokenizer(), 4, False), 5, seed)["input_ids"] for seed in (1, 1, 2)
    )
    assert first.shape == (5, 4) and torch.equal(first, same) and not torch.equal(first, other)
    lengths = {len(tokenizer()(line)["input_ids"]) for line in LINES}
    assert encode(story, Tokenization(tokenizer(), 64, False), 1000, 0)["input_ids"].shape == (len(LINES), max(lengths))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"text": "the fox", "label": 1}\n\n"the cat"\n["the fox", "the owl"]\n{"text": "a", "text_pair": "b"}\n'
    )
    assert read_text(path) == ["the fox", "the cat", ("the fox", "the owl"), ("a", "b")]
    found = encode(path, Tokenization(tokenizer(), 64, False), 10, 0)
    assert tokenizer()("the fox", "the owl")["input_ids"] in found["input_ids"].tolist()


def test_json_lines_run_together_for_a_causal_model(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    expected = tokenizer()("\n\n".join(LINES))["input_ids"]
    assert encode(path, causal(8), 5, 0)["input_ids"].flatten().tolist() == expected[:len(expected) // 8 * 8]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"", ["is empty"]),
        ("a.txt", b" \n\n", ["is empty"]),
        ("a.jsonl", b"\n", ["is empty"]),
        ("a.txt", b"the fox", ["3 tokens", "one sequence of 8", "--seq-len"]),
        ("a.txt", b"\xff\xfe\x00", ["UTF-8"]),
        ("a.jsonl", b'"the fox"\n{"text": ', ["line 2", "not valid JSON"]),
        ("a.jsonl", b'{"txt": "x"}', ["line 1", '"text"']),
        ("a.jsonl", b"[1, 2]", ["line 1"]),
        ("a.jsonl", b'["a", "b"]', ["pairs"]),
    ],
)
def test_text_that_cannot_be_used(name: str, content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(path, text=causal())
    assert all(word in str(caught.value) for word in [*words, str(path)]), str(caught.value)


def test_text_needs_a_tokenizer_and_a_model_that_reads_it(story: Path) -> None:
    with pytest.raises(CalibrationError, match="--tokenizer DIR"):
        load(story, text=Tokenization(None, 8, True))
    with pytest.raises(CalibrationError, match="takes pixel_values float32"):
        load(story, IMAGE)


def test_a_tokenizer_of_another_model_is_found_out(story: Path) -> None:
    few = InputSpec("input_ids", (None, None), torch.int64, below=5)
    with pytest.raises(CalibrationError, match="another tokenizer"):
        load(story, few, MASK, text=causal())
