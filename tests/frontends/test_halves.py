"""Encoder-decoders as they are loaded: what they are known by, what they write, and their halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language import LENGTH, LINES, VOCABULARY, save, tokenizer
from seq2seq import FEATURES, FRAMES, make
from seq2seq import save as save_pair

from repquant_fx.errors import InputError
from repquant_fx.frontends.encoder_decoder import halves, writer_of
from repquant_fx.frontends.huggingface import writes
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.memory import from_memory
from repquant_fx.frontends.processor import features_shape
from repquant_fx.options import Calibration, Source
from repquant_fx.pipeline.padding import find_padding
from repquant_fx.preparation import match, prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for name in ("t5", "whisper"):
        save_pair(name, root / name)
    save("opt", root / "opt")
    return root


def read(name: str) -> tuple[torch.Tensor, ...]:
    """Three samples of what an encoder reads, the first of them padded."""
    if name == "whisper":
        return (torch.randn(3, FEATURES, FRAMES, generator=torch.Generator().manual_seed(5)),)
    given = tokenizer()([LINES[0][:12], *LINES[4:6]], return_tensors="pt", padding=True)
    return given["input_ids"], given["attention_mask"]


def test_what_is_one(place: Path) -> None:
    assert writes(str(place / "t5")) and writes(str(place / "whisper"))
    assert not writes(str(place / "opt")) and not writes(str(place / "none"))


def test_a_task_that_leaves_the_decoder_alone_is_no_encoder_decoder(tmp_path: Path) -> None:
    save_pair("bart", tmp_path / "bart")
    assert writes(str(tmp_path / "bart")) and not writes(str(tmp_path / "bart"), "masked-lm")
    assert load_model(tmp_path / "bart", task="masked-lm").writer is None


def test_the_feature_extractor_gives_the_example(place: Path) -> None:
    assert features_shape(place / "whisper") == (FEATURES, FRAMES) and features_shape(place / "t5") is None
    loaded = load_model(place / "whisper")
    assert loaded.input_names == ("input_features", "decoder_input_ids") and loaded.task == "speech-seq2seq"
    assert loaded.example_inputs[0].shape == (2, FEATURES, FRAMES) and loaded.preprocessing is None


def test_without_a_feature_extractor_the_shape_is_asked_for() -> None:
    with pytest.raises(InputError, match="pass --input-shape, features and frames"):
        from_memory(make("whisper"))
    found = from_memory(make("whisper"), input_shape=(FEATURES, FRAMES))
    assert found.example_inputs[0].shape[1:] == (FEATURES, FRAMES)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_it_writes_what_greedy_decoding_writes(name: str) -> None:
    model, batch, tokens = make(name), read(name), 12
    writer = from_memory(model, input_shape=(FEATURES, FRAMES) if name == "whisper" else None).writer
    assert writer is not None
    endless = writer.write(batch, writer.read(batch), tokens).tolist()
    places = {end: {row.index(end) if end in row else tokens for row in endless} for row in endless for end in row[1:]}
    end = next(end for end, found in places.items() if len(found) > 1)  # where one text ends, another goes on
    model.generation_config.eos_token_id = end
    given: dict[str, Any] = dict(zip(writer.names, batch))
    expected = model.generate(**given, max_new_tokens=tokens - 1, do_sample=False, num_beams=1).tolist()
    writer = writer_of(model, (*writer.names, "decoder_input_ids"))
    assert writer is not None and writer.ends == (end,)
    for mine, other in zip(writer.write(batch, writer.read(batch), tokens).tolist(), expected):
        other = other if other[0] == writer.start else [writer.start, *other]  # Whisper's leaves it out, and the end
        length = mine.index(end) if end in mine else tokens
        assert mine[:length] == other[:length] and set(mine[length:]) <= {end}
    assert writer.complete(batch, tokens)[-1].shape == (3, tokens)


def test_a_decoder_writes_no_more_tokens_than_it_has_places_for() -> None:
    writer = from_memory(make("whisper"), input_shape=(FEATURES, FRAMES)).writer
    assert writer is not None and writer.longest == 32
    assert writer.half(read("whisper"), 100)[0].shape == (3, 32)


def test_without_a_first_token_it_is_refused() -> None:
    model = make("bart")
    for described in (model.config, model.generation_config):
        described.decoder_start_token_id = described.bos_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        from_memory(model)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_the_halves_make_the_whole(name: str, place: Path) -> None:
    loaded = load_model(place / name)
    encoder, decoder = halves(loaded)
    batch = read(name)
    assert loaded.writer is not None and loaded.input_names is not None
    ids, *told = loaded.writer.half(batch)
    with torch.no_grad():
        whole = loaded.module(**dict(zip(loaded.input_names, (*batch, ids))))["logits"]
        assert torch.equal(told[-1], encoder.module(**dict(zip(encoder.input_names, batch)))["last_hidden_state"])
        found = decoder.module(**dict(zip(decoder.input_names, (ids, *told))))["logits"]
    assert torch.allclose(found, whole, atol=1e-5)
    masks = ["encoder_attention_mask"] if name == "t5" else []
    assert decoder.input_names == ("input_ids", *masks, "encoder_hidden_states")


def test_padding_of_both_sides_does_not_count(place: Path) -> None:
    decoder = match(Source(halves(load_model(place / "t5"))[1]))
    ids = torch.tensor([[2, 5, 1, 1, 1], [2, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    padding = find_padding(decoder.graph_module, [(ids, mask, torch.randn(2, 4, 16))])
    by_name = {name: counts for name, counts in padding.by_batch[0].items()}
    assert by_name["input_ids"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert by_name["encoder_hidden_states"].squeeze(-1).tolist() == [[True, True, False, False], [True] * 4]
    crossed = [counts for counts in by_name.values() if counts.shape[-2:] == (5, 4)]
    assert crossed and crossed[0][0, 0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 3


def test_a_rule_for_one_half_is_no_mistake_in_the_other(place: Path, recwarn: pytest.WarningsRecorder) -> None:
    encoder, _ = halves(load_model(place / "whisper"))
    match(Source(encoder), {"layers": [{"match": "model.decoder.layers.0.fc1", "wbits": 4}]})
    assert not [w for w in recwarn if "matches no layer" in str(w.message)]
    with pytest.warns(match="matches no layer"):
        match(Source(encoder), {"layers": [{"match": "model.decoder.layers.7.fc1", "wbits": 4}]})


def test_the_whole_is_a_model_of_its_own() -> None:
    ids = torch.randint(3, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    prepared = prepare(Source(make("bart")), Calibration(ids))
    assert prepared.captured.input_names == ["input_ids", "attention_mask", "decoder_input_ids"]
    assert prepared.captured.output_names == ["logits"]
    (batch,) = prepared.data.batches
    assert [tuple(tensor.shape) for tensor in batch] == [(6, 10), (6, 10), (6, LENGTH)]
    assert prepared.graph_module(*batch).shape == (6, LENGTH, VOCABULARY)
