"""A file that decodes with a key/value cache computes what one of whole sequences computes, however a text is split."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from compiled import PLAIN
from helpers import redraw
from language import MODELS, TEXT, VOCABULARY
from language import make as small
from torch import nn

from repquant_fx import CompiledModel, InputError, Recipe, compile
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.evaluation.decoder import Decoder
from repquant_fx.evaluation.runners import Runner, open_runner
from repquant_fx.file_check import check_file
from repquant_fx.generation import generate
from repquant_fx.options import Source
from repquant_fx.preparation import match

LENGTH = 12
IDS = torch.randint(3, VOCABULARY, (12, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.where(torch.arange(LENGTH) < torch.tensor([[4], [LENGTH], [9], [LENGTH]]).repeat(3, 1), 1, 0)


def make(name: str) -> nn.Module:
    """With grouped heads (llama), learned positions (gpt2), positions by the mask (opt), a window (mistral)."""
    import transformers as t

    if name in MODELS:
        return small(name)
    torch.manual_seed(0)
    if name == "gpt2":
        return redraw(t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)))
    return redraw(t.MistralForCausalLM(t.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64)))


@functools.cache
def compiled(name: str, with_past: bool = True, **changes: Any) -> CompiledModel:
    data = {"input_ids": IDS, "attention_mask": MASK}
    return compile(make(name), data, Recipe(**{**PLAIN, **changes}), with_past=with_past)


def runner(model: CompiledModel, folder: Path) -> Runner:
    return open_runner(Source(str(model.save(folder / "m.onnx", force=True))), threads=1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["mistral", *(pytest.param(name, marks=SLOW) for name in ("llama", "opt", "gpt2"))])
def test_logits_and_codes_are_the_same_however_a_text_is_split(name: str, tmp_path: Path) -> None:
    found, ids = runner(compiled(name), tmp_path), IDS[:3]
    whole = Decoder(found)
    expected = whole(ids)
    assert {cache.dtype for cache in whole.caches.values()} == {torch.uint8}
    for lengths in ([1] * LENGTH, [5, 7], [LENGTH - 1, 1]):
        decoder = Decoder(found)
        logits = torch.cat([decoder(part) for part in ids.split(lengths, 1)], 1)
        assert torch.allclose(logits, expected, atol=1e-5)
        for key, codes in whole.caches.items():
            assert torch.equal(decoder.caches[key], codes)


@pytest.mark.parametrize("name", ["mistral", pytest.param("gpt2", marks=SLOW)])
def test_it_computes_what_the_file_of_whole_sequences_computes(name: str, tmp_path: Path) -> None:
    """Calibrated on padded sequences: what is padding is told in both."""
    cached, plain = compiled(name), compiled(name, with_past=False)
    weights = [{t.name: t.raw_data for t in model.proto.graph.initializer if "_quantized" in t.name}
               for model in (cached, plain)]
    assert weights[0] == weights[1]
    assert cached.report["output_sqnr_db"] == pytest.approx(plain.report["output_sqnr_db"], abs=1e-3)
    (expected,) = plain.session(1).run(["logits"], {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()})
    logits = Decoder(runner(cached, tmp_path))(IDS, MASK)
    assert torch.allclose(logits[MASK == 1], torch.from_numpy(expected)[MASK == 1], atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", pytest.param("opt", marks=SLOW), pytest.param("gpt2", marks=SLOW)])
def test_padding_in_front_is_not_counted(name: str, tmp_path: Path) -> None:
    found, ids = runner(compiled(name), tmp_path), IDS[:2]
    expected = Decoder(found)(ids)
    decoder, zeros = Decoder(found), torch.zeros(2, 3, dtype=torch.int64)
    decoder(torch.cat([zeros, ids[:, :5]], 1), torch.cat([zeros, torch.ones_like(ids[:, :5])], 1))
    assert float((decoder(ids[:, 5:]) - expected[:, 5:]).norm() / expected[:, 5:].norm()) < 1e-4


def test_names_and_free_axes() -> None:
    graph = compiled("mistral").proto.graph

    def axes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    past = {f"past_key_values.0.{kind}": ["batch", 2, "past_sequence", 4] for kind in ("key", "value")}
    assert axes(graph.input) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total_sequence"],
                                 "position_ids": ["batch", "sequence"], **past}
    assert list(axes(graph.output)) == ["logits", "present.0.key", "present.0.value"]


def test_the_report_says_how_keys_and_values_are_kept() -> None:
    kept = compiled("mistral").report["caches"]
    assert list(kept) == ["past_key_values.0.key", "past_key_values.0.value"]
    for name, cache in kept.items():
        sites = [site for layer in compiled("mistral").report["layers"] for site in layer["inputs"]
                 if site["name"].endswith(f"/{name.rpartition('.')[2]}")]
        assert cache["dtype"] == "uint8" and cache["scale"] == sites[0]["scale"] and cache["bits"] == 8


def test_nothing_is_quantized_twice() -> None:
    """One QuantizeLinear a site; what a cache gives goes to its DequantizeLinear as it is."""
    files = (compiled("mistral").proto, compiled("mistral", with_past=False).proto)
    counts = [[node.op_type for node in file.graph.node].count("QuantizeLinear") for file in files]
    assert counts[0] == counts[1]


@SLOW
def test_float_caches(tmp_path: Path) -> None:
    found, codes = runner(compiled("llama", cache="float"), tmp_path), runner(compiled("llama"), tmp_path)
    decoder = Decoder(found)
    logits = torch.cat([decoder(part) for part in IDS[:2].split([7, 5], 1)], 1)
    assert {cache.dtype for cache in decoder.caches.values()} == {torch.float32}
    assert torch.allclose(logits, Decoder(codes)(IDS[:2]), atol=1e-5)


@SLOW
def test_few_bits_and_four_bit_containers(tmp_path: Path) -> None:
    model = compiled("llama", wbits=4, abits=4)
    decoder = Decoder(runner(model, tmp_path))
    decoder(IDS[:2])
    assert all(int(cache.max()) < 16 for cache in decoder.caches.values())
    narrow = compiled("llama", wbits=4, abits=4, container="int4")  # codes of four bits are no tensors of Python's
    assert {v.type.tensor_type.elem_type for v in narrow.proto.graph.input if "past" in v.name} == {
        onnx.TensorProto.FLOAT}


def test_weights_alone_keep_float_caches(tmp_path: Path) -> None:
    model = compiled("mistral", wbits=4, abits="none", group_size=16)
    found, ids = runner(model, tmp_path), IDS[:3]
    whole, decoder = Decoder(found), Decoder(found)
    logits = torch.cat([decoder(part) for part in ids.split([5, 7], 1)], 1)
    assert torch.allclose(logits, whole(ids), atol=1e-5)
    assert {cache.dtype for cache in whole.caches.values()} == {torch.float32} and not model.report["runtime_form"]


def test_such_a_file_is_checked_half_way(tmp_path: Path) -> None:
    path = compiled("mistral").save(tmp_path / "m.onnx")
    found = check_file(path)
    assert not found.parity.problems() and len(found.parity.quantizers) == 9


def test_generating_is_greedy_or_seeded(tmp_path: Path) -> None:
    found, prompt = runner(compiled("mistral"), tmp_path), IDS[0, :4].tolist()
    greedy = generate(found, prompt, 6)
    ids = list(prompt)
    for token in greedy.tokens:
        assert token == int(Decoder(found)(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert greedy.tokens_per_second > 0
    first = greedy.tokens.index(greedy.tokens[-1])
    assert generate(found, prompt, 6, ends=greedy.tokens[-1:]).tokens == greedy.tokens[:first + 1]
    drawn = [generate(found, prompt, 8, temperature=5.0, seed=seed).tokens for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_files_that_are_no_decoders_are_refused() -> None:
    specs = (InputSpec("input_ids", (None, None), torch.int64), InputSpec("attention_mask", (None, None), torch.int64),
             InputSpec("past_key_values.0.key", (None, 2, None, 4), torch.uint8))

    def gives(**outputs: torch.Tensor) -> Runner:
        return Runner(lambda feed: {name.replace("__", "."): t for name, t in outputs.items()}, specs,
                      ("batch", "batch", "batch"), "the file")

    cache = torch.zeros(1, 2, 3, 4)
    for runner, words in ((gives(logits=torch.zeros(1, 2, 8)), "gives no present.0.key"),
                          (gives(present__0__key=cache), "gives no logits"),
                          (gives(logits=torch.zeros(8), present__0__key=cache), "shape"),
                          (gives(logits=torch.full((1, 2, 8), float("nan")), present__0__key=cache), "NaN")):
        with pytest.raises(InputError, match=words):
            generate(runner, [1, 2], 3)
    with pytest.raises(InputError, match="no token"):
        generate(gives(), [], 3)
    huge = InputSpec("past_key_values.0.key", (None, 1 << 30, 1 << 30, 1 << 10), torch.uint8)
    with pytest.raises(InputError, match=r"past_key_values\.0\.key"):
        Decoder(replace(gives(), inputs=(*specs[:2], huge)))(torch.tensor([[1]]))


def test_a_cache_is_the_default_where_the_model_keeps_one() -> None:
    import transformers as t

    source = Source(small("opt"))
    assert match(source).loaded.past is None and match(source, with_past=None).loaded.past is not None
    short = Source(redraw(t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "max_position_embeddings": 4}))))
    without = match(short, with_past=None)
    assert without.loaded.past is None and without.captured.input_names == ["input_ids", "attention_mask"]
    assert without.notes == (
        "the file keeps no keys and values of earlier tokens: its sequences have 4 tokens at most",)
    with pytest.raises(InputError, match="4 tokens at most"):
        match(short, with_past=True)
    assert match(Source(small("bert")), with_past=None).notes == ()


def test_what_has_no_cache_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="causal language models"):
        compile(small("bert"), {"input_ids": IDS}, Recipe(**PLAIN), with_past=True)
    with pytest.raises(InputError, match="--with-past"):
        Decoder(runner(compiled("mistral", with_past=False), tmp_path))
