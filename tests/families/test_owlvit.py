"""OWL-ViT: as many texts as images, each image searched for what its text says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled import PLAIN
from helpers import redraw
from language import TEXT, VISION, VOCABULARY
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.frontends.memory import from_memory


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
def test_the_whole_way() -> None:
    model = owlvit()
    compiled = compile(model, inputs(16, 1), Recipe(**PLAIN))  # the codes are checked on the way
    given = inputs(3, 2)
    with torch.no_grad():
        expected = model(**given)
    found = compiled.session(1).run(["logits", "pred_boxes"], {name: value.numpy() for name, value in given.items()})
    for mine, name in zip(found, ("logits", "pred_boxes")):
        other = expected[name].numpy()
        assert mine.shape == other.shape and np.abs(mine - other).max() < 0.2 * np.abs(other).max()
