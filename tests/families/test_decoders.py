"""Families of causal language models that decode with a cache: logits are the same however a text is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import PLAIN
from helpers import redraw
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.evaluation.decoder import Decoder
from repquant_fx.evaluation.runners import proto_runner

VOCABULARY, LENGTH = 80, 12
IDS = torch.randint(3, VOCABULARY, (12, LENGTH), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}
WINDOW = {"sliding_window": 4}  # shorter than the texts
MOE = {"num_experts_per_tok": 2}


def model(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as t

        config = getattr(t, name.replace("ForCausalLM", "TextConfig" if name.startswith("Gemma3") else "Config"))
        return getattr(t, name)(config(**{**COMMON, **more}))  # type: ignore[no-any-return]

    return build


MODELS = {
    "gemma2": model("Gemma2ForCausalLM", head_dim=4, query_pre_attn_scalar=4, **WINDOW),
    "gemma3": model("Gemma3ForCausalLM", head_dim=4, query_pre_attn_scalar=4, **WINDOW,
                    layer_types=["sliding_attention", "full_attention"]),
    "phi3": model("Phi3ForCausalLM"),
    "mistral": model("MistralForCausalLM", **WINDOW),
    "qwen3": model("Qwen3ForCausalLM", head_dim=4),
    "qwen3_moe": model("Qwen3MoeForCausalLM", head_dim=4, num_experts=4, moe_intermediate_size=12, **MOE),
    "mixtral": model("MixtralForCausalLM", num_local_experts=4, **MOE),
    "deepseek_v3": model("DeepseekV3ForCausalLM", num_key_value_heads=4, moe_intermediate_size=12, n_routed_experts=4,
                         n_shared_experts=1, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, v_head_dim=4,
                         qk_rope_head_dim=4, qk_nope_head_dim=4, first_k_dense_replace=1, **MOE),
}
FLOAT_CACHES = {"deepseek_v3"}  # more than products read what they keep


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_however_a_text_is_split(name: str) -> None:
    torch.manual_seed(0)
    module = redraw(MODELS[name]())
    data = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    compiled = compile(module, data, Recipe(**PLAIN), with_past=True)
    runner, ids = proto_runner(compiled.proto, name, 1), IDS[:3]
    whole = Decoder(runner)
    expected = whole(ids)
    kept = torch.float32 if name in FLOAT_CACHES else torch.uint8
    assert {cache.dtype for cache in whole.caches.values()} == {kept}
    for lengths in ([1] * LENGTH, [5, 7], [LENGTH - 1, 1]):
        decoder = Decoder(runner)
        assert torch.allclose(torch.cat([decoder(part) for part in ids.split(lengths, 1)], 1), expected, atol=1e-5)
    with torch.no_grad():
        exact = module(input_ids=ids).logits
    noise = (exact - expected).square().sum() / exact.square().sum()
    assert float(noise) < 0.05  # plain rounding of random weights: it is the same model
