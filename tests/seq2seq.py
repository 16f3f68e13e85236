"""Tiny encoder-decoders of transformers with random weights, as directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import redraw
from language import LENGTH, VOCABULARY, tokenizer
from torch import nn

FEATURES, FRAMES = 8, 40
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "decoder_start_token_id": 3, "tie_word_embeddings": False,
}


def t5() -> nn.Module:
    import transformers as t

    return t.T5ForConditionalGeneration(t.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, eos_token_id=1, pad_token_id=2,
        decoder_start_token_id=2, tie_word_embeddings=False))


def bart() -> nn.Module:
    import transformers as t

    return t.BartForConditionalGeneration(t.BartConfig(
        **SHARED, max_position_embeddings=LENGTH, forced_eos_token_id=None))


def whisper() -> nn.Module:
    import transformers as t

    return t.WhisperForConditionalGeneration(t.WhisperConfig(
        **SHARED, max_target_positions=32, max_source_positions=FRAMES // 2, num_mel_bins=FEATURES))


MODELS: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart, "whisper": whisper}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return redraw(MODELS[name]())


def save(name: str, folder: Path) -> Any:
    """Write a model, its tokenizer and its feature extractor; returns the model."""
    import transformers as t

    model = make(name)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if name == "whisper":
        t.WhisperFeatureExtractor(feature_size=FEATURES, chunk_length=1, sampling_rate=10 * FRAMES,
                                  hop_length=10).save_pretrained(folder)
    return model
