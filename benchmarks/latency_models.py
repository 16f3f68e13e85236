"""The models of `latency.py` and `compile_time.py`, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LENGTH, VOCABULARY = 128, 1000


@dataclass(frozen=True)
class Entry:
    """A model, how to make inputs for it, and its name in tables."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


def image(side: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"x": torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))}


def tokens(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)
    return build


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            word_embed_proj_dim=512,
            ffn_dim=2048,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                intermediate_size=1536), add_pooling_layer=False)


MODELS = {
    "deit_tiny": Entry("DeiT-Tiny, 224 px", timm("deit_tiny_patch16_224"), image(224)),
    "deit_small": Entry("DeiT-Small, 224 px", timm("deit_small_patch16_224"), image(224)),
    "vit_base": Entry("ViT-Base, 224 px", timm("vit_base_patch16_224"), image(224)),
    "swin_tiny": Entry("Swin-Tiny, 224 px", timm("swin_tiny_patch4_window7_224"), image(224)),
    "opt": Entry("OPT, 4 layers of 512, 128 tokens", opt, tokens),
    "llama": Entry("LLaMA, 4 layers of 512, 128 tokens", llama, tokens),
    "minilm": Entry("MiniLM-L6, 128 tokens", minilm, tokens),
}
