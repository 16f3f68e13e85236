"""One small model of each family, weights drawn anew: what is peculiar in its structure, at a size that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from helpers import redraw
from torch import Tensor, nn

Inputs = dict[str, Tensor]
BATCH = {0: "batch"}
TEXT = {0: "batch", 1: "sequence"}
VOCABULARY, POSITIONS = 64, 48


@dataclass(frozen=True)
class Family:
    """How a family is built and fed.

    Attributes:
        build: the model, before its weights are drawn anew.
        inputs: (batch, length, seed) to inputs by name; one called `x` is passed by position.
        axes: free axes by input; an input that is not named has a free batch.
        outputs: outputs to keep, all where None.
        left: what the report says of norms and softmaxes that are left alone: glob of their module paths to part of the
            reason.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    axes: Mapping[str, dict[int, str]]
    outputs: tuple[str, ...] | None = None
    float_modules: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        model = redraw(self.build())
        if hasattr(model, "config"):
            model.config.use_cache = False  # type: ignore[union-attr]
        return model

    def free(self, names: list[str]) -> list[dict[int, str]]:
        return [self.axes.get(name, BATCH) for name in names]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(
    side: int, name: str = "x", **more: Callable[[int, torch.Generator], Tensor]
) -> Callable[[int, int, int], Inputs]:
    def make(batch: int, length: int, seed: int) -> Inputs:
        g = _generator(seed)
        return {
            name: torch.randn(batch, 3, side, side, generator=g),
            **{key: value(batch, g) for key, value in more.items()},
        }

    return make


def text(batch: int, length: int, seed: int) -> Inputs:
    """Token ids, all of them real."""
    ids = torch.randint(4, VOCABULARY, (batch, length), generator=_generator(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_and_image(batch: int, length: int, seed: int) -> Inputs:
    words = text(batch + 1, length, seed)
    words["input_ids"][:, -1] = VOCABULARY - 1  # end of text, where CLIP reads the text
    return {**words, "pixel_values": torch.randn(batch, 3, 16, 16, generator=_generator(seed))}


def ids_and_image(batch: int, length: int, seed: int) -> Inputs:
    """Text without a mask, and images."""
    return {name: value for name, value in text_and_image(batch, length, seed).items() if name != "attention_mask"}


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm as library

        return library.create_model(name, **options)
    return build


def hf(cls: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        settings = {key: value() if callable(value) else value for key, value in options.items()}
        return getattr(transformers, cls)(getattr(transformers, config)(**settings))
    return build


def hf_config(config: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, config)(**options)
    return build


VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 20,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (1, 2),
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "head_dim": 8,
    "pad_token_id": 0,
}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "eos_token_id": VOCABULARY - 1,
}
CLIP_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
HF_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SAM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
    "mlp_dim": 48,
    "num_pos_feats": 8,
}
HF_SWIN: dict[str, Any] = {
    "image_size": 20,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}


# true reasons to leave a norm alone
RESIDUAL = "read by"  # the residual (or the next norm) reads it, no Linear does
PRODUCT = "in blocks.0.attn"  # queries and keys are multiplied with each other
OUTPUT = "it is an output of the model"
TEXT_AXES = {"input_ids": TEXT, "attention_mask": TEXT}


def vision(build: Callable[[], nn.Module], side: int = 16, name: str = "x", **options: Any) -> Family:
    return Family(build, image(side, name), {}, **options)


def language(build: Callable[[], nn.Module], **options: Any) -> Family:
    return Family(build, text, TEXT_AXES, **options)


FAMILIES: dict[str, Family] = {
    "vit": vision(timm("vit_tiny_patch16_224", **VIT)),
    "deit_distilled": vision(timm("deit_tiny_distilled_patch16_224", **VIT)),
    "beit": vision(timm("beit_base_patch16_224", **VIT)),
    "eva02": vision(timm("eva02_tiny_patch14_224", **VIT)),
    "clip_image_timm": vision(timm("vit_base_patch32_clip_224", **VIT), left={"norm_pre": RESIDUAL}),
    "dinov2_registers": vision(timm("vit_small_patch14_reg4_dinov2", **VIT)),
    "vit_qk_norm": vision(timm("vit_tiny_patch16_224", qk_norm=True, **VIT), left={"*.[qk]_norm": PRODUCT}),
    "vit_layer_scale": vision(timm("vit_tiny_patch16_224", init_values=0.1, **VIT)),
    "vit_average": vision(timm("vit_tiny_patch16_224", global_pool="avg", class_token=False, **VIT)),
    "vit_average_late": vision(timm("vit_tiny_patch16_224", global_pool="avg", fc_norm=False, **VIT)),
    "vit_no_affine": vision(
        timm("vit_tiny_patch16_224", norm_layer=partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False), **VIT)
    ),
    "cait": vision(timm("cait_xxs24_224", **VIT), left={"blocks.0.attn": "not an operand"}),
    "vit_attention_pool": vision(timm("vit_base_patch16_siglip_224", **VIT)),
    "swin": vision(
        timm("swin_tiny_patch4_window7_224", num_classes=5, **SWIN), 20, left={"patch_embed.norm": RESIDUAL}
    ),
    "swin_v2": vision(timm("swinv2_tiny_window8_256", num_classes=5, **SWIN), 20, left={"layers.*.norm?": RESIDUAL}),
    "swin_v2_even": vision(
        timm("swinv2_tiny_window8_256", num_classes=5, **{**SWIN, "img_size": 16}), left={"layers.*.norm?": RESIDUAL}
    ),
    "swin_hf": vision(
        hf("SwinForImageClassification", "SwinConfig", num_labels=5, **HF_SWIN),
        20,
        "pixel_values",
        left={"swin.embeddings.norm": RESIDUAL},
    ),
    "swin_v2_hf": vision(
        hf("Swinv2ForImageClassification", "Swinv2Config", num_labels=5, **HF_SWIN),
        20,
        "pixel_values",
        left={"*.layernorm_*": RESIDUAL},
    ),
    "swin_features": vision(
        timm("swin_tiny_patch4_window7_224", features_only=True, **SWIN), 20, left={"patch_embed.norm": RESIDUAL}
    ),
    "sam_timm": vision(
        timm(
            "samvit_base_patch16",
            img_size=32,
            patch_size=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            window_size=3,
            global_attn_indexes=(1,),
            neck_chans=16,
        ),
        32,
        left={"neck.1": "conv2d", "neck.3": OUTPUT},
    ),
    "sam_hf": vision(
        hf("SamVisionModel", "SamVisionConfig", **SAM),
        32,
        "pixel_values",
        left={"*.neck.layer_norm1": "conv2d", "*.neck.layer_norm2": OUTPUT},
    ),
    "sam_whole": Family(
        hf(
            "SamModel",
            "SamConfig",
            vision_config=hf_config("SamVisionConfig", **SAM),
            prompt_encoder_config=hf_config(
                "SamPromptEncoderConfig", hidden_size=16, image_size=32, patch_size=4, mask_input_channels=4
            ),
            mask_decoder_config=hf_config(
                "SamMaskDecoderConfig", hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        ),
        image(32, "pixel_values", input_points=lambda batch, g: 32 * torch.rand(batch, 1, 2, 2, generator=g)),
        {},
        outputs=("iou_scores", "pred_masks"),
        float_modules=tuple(
            glob
            for name in ("prompt_encoder", "mask_decoder", "shared_image_embedding")
            for glob in (name, f"{name}.*")
        ),
        left={"*.neck.layer_norm1": "conv2d", "*.neck.layer_norm2": RESIDUAL, "mask_decoder.*": ""},
    ),
    "opt": language(hf("OPTForCausalLM", "OPTConfig", **OPT)),
    "opt_post_norm": language(
        hf("OPTForCausalLM", "OPTConfig", do_layer_norm_before=False, word_embed_proj_dim=24, **OPT)
    ),
    "llama": language(hf("LlamaForCausalLM", "LlamaConfig", **DECODER)),
    "mistral": language(hf("MistralForCausalLM", "MistralConfig", sliding_window=6, **DECODER)),
    "qwen2": language(hf("Qwen2ForCausalLM", "Qwen2Config", **{k: v for k, v in DECODER.items() if k != "head_dim"})),
    "qwen3": language(hf("Qwen3ForCausalLM", "Qwen3Config", **DECODER), left={"*.[qk]_norm": "mul"}),
    "phi3": language(hf("Phi3ForCausalLM", "Phi3Config", eos_token_id=2, **DECODER)),
    "mixtral": language(
        hf("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, num_experts_per_tok=2, **DECODER),
        left={"model.layers.0.mlp.gate": "not an operand"},
    ),
    "gemma2": language(hf("Gemma2ForCausalLM", "Gemma2Config", **DECODER), left={"*.post_*_layernorm": RESIDUAL}),
    "clip": Family(
        hf(
            "CLIPModel",
            "CLIPConfig",
            text_config=hf_config("CLIPTextConfig", **CLIP_TEXT),
            vision_config=hf_config("CLIPVisionConfig", **CLIP_IMAGE),
            projection_dim=24,
        ),
        text_and_image,
        {name: {0: "text_batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
        outputs=("logits_per_image", "text_embeds", "image_embeds"),
        float_modules=("matmul*",),
        left={"vision_model.pre_layrnorm": RESIDUAL},
    ),
    "siglip": Family(
        hf(
            "SiglipModel",
            "SiglipConfig",
            text_config=hf_config("SiglipTextConfig", bos_token_id=1, **CLIP_TEXT),
            vision_config=hf_config("SiglipVisionConfig", **CLIP_IMAGE),
        ),
        ids_and_image,
        {"input_ids": {0: "text_batch", 1: "sequence"}},
    ),
    "bert": language(hf("BertModel", "BertConfig", **BERT)),
    "bert_masked": language(hf("BertForMaskedLM", "BertConfig", **BERT), outputs=("logits",)),
    "gpt2": language(
        hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=1,
            n_head=4,
            n_positions=POSITIONS,
        )
    ),
    "vit_hf": vision(hf("ViTForImageClassification", "ViTConfig", **HF_VIT), name="pixel_values"),
    "dinov2_hf": vision(
        hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **HF_VIT),
        name="pixel_values",
        left={"layernorm": OUTPUT},
    ),
    "detr": vision(
        hf(
            "DetrForObjectDetection",
            "DetrConfig",
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=hf_config("SwinConfig", out_features=["stage2"], **HF_SWIN),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=4,
            auxiliary_loss=False,
        ),
        20,
        "pixel_values",
        outputs=("logits", "pred_boxes"),
        left={
            "*.embeddings.norm": RESIDUAL,
            "*.self_attn_layer_norm": RESIDUAL,
            "*.decoder.layers.0.final_layer_norm": "layer_norm",
            "*.decoder.layers.0.self_attn": "",
        },
    ),
    "yolos": vision(
        hf("YolosForObjectDetection", "YolosConfig", num_detection_tokens=4, **{**HF_VIT, "image_size": [16, 16]}),
        name="pixel_values",
        outputs=("logits", "pred_boxes"),
    ),
}
