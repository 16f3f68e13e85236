"""OWL-ViT: as many texts as images, each image searched for what its text says."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from helpers import redraw
from language import TEXT, VISION, VOCABULARY
from torch import nn

from repquant_fx.frontends.memory import from_memory
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.preparation import prepare


def owlvit() -> nn.Module:
    import transformers as t

    words = {**TEXT, "max_position_embeddings": 16}
    config = t.OwlViTConfig(text_config=words, vision_config=VISION, projection_dim=16)
    torch.manual_seed(0)
    return redraw(t.OwlViTForObjectDetection(config))


def inputs(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def test_what_it_takes_and_gives() -> None:
    loaded = from_memory(owlvit())
    assert loaded.task == "zero-shot-object-detection" and loaded.outputs == ("logits", "pred_boxes")
    assert loaded.input_names == ("input_ids", "attention_mask", "pixel_values")


@pytest.mark.slow
def test_it_is_matched_and_has_an_onnx_form() -> None:
    prepared = prepare(Source(owlvit()), Calibration(inputs(16, 1)), PLAIN, Run())
    assert prepared.captured.output_names == ["logits", "pred_boxes"] and len(prepared.plan.groups) == 17
    assert "class_head" in [item.path for item in prepared.plan.left_alone]  # how alike texts and places are
    assert [len(tensor) for tensor in prepared.graph_module(*inputs(3, 2).values())] == [3, 3]
