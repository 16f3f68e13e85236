"""Tiny transformers models with random weights, and tokenizers trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import redraw
from torch import nn

VOCABULARY, LENGTH = 80, 64
WIDTH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {
    **WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 2,
}
VISION = {**WIDTH, "image_size": 16, "patch_size": 8}
LINES = [
    f"the {a} {b} sees a {c} in the {d}"
    for a in ("red", "old", "big", "shy")
    for b in ("fox", "cat", "owl")
    for c in ("boat", "tree", "house")
    for d in ("rain", "sun")
]


def opt() -> nn.Module:
    import transformers as t

    return t.OPTForCausalLM(
        t.OPTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=16,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def llama() -> nn.Module:
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, num_key_value_heads=1))


def bert() -> nn.Module:
    import transformers as t

    return t.BertForSequenceClassification(t.BertConfig(**TEXT))


def clip() -> nn.Module:
    import transformers as t

    return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def vit() -> nn.Module:
    import transformers as t

    return t.ViTForImageClassification(t.ViTConfig(**VISION))


def sam() -> nn.Module:
    import transformers as t

    vision = {
        **WIDTH,
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 16,
        "window_size": 3,
        "global_attn_indexes": [0],
        "num_pos_feats": 8,
        "mlp_dim": 24,
    }
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "iou_head_hidden_dim": 16,
    }
    return t.SamModel(t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": opt,
    "llama": llama,
    "bert": bert,
    "clip": clip,
    "vit": vit,
    "sam": sam,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return redraw(MODELS[name]())


def tokenizer(padding_side: str = "right") -> Any:
    """Words of LINES; ids below the vocabulary; <s> first and <pad> as filler."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    words.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=special, vocab_size=VOCABULARY))
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side=padding_side,
    )


def save(name: str, folder: Path, *, with_tokenizer: bool = False, **options: Any) -> nn.Module:
    """Write a model (and a tokenizer) as a transformers directory; returns the model."""
    model = make(name)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return model
