"""Architecture specifications, and the inputs and preprocessing that a module implies."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends import architectures as arch


def test_specification_is_parsed() -> None:
    found = arch.parse_architecture(
        "timm:swin_tiny,depths=(2,4),num_heads=[1, 2],drop_rate=.5,global_pool=avg,act='a,b',qk=None,pretrained"
    )
    assert (found.library, found.name, found.pretrained) == ("timm", "swin_tiny", True)
    assert found.options == {
        "depths": (2, 4),
        "num_heads": [1, 2],
        "drop_rate": 0.5,
        "global_pool": "avg",
        "act": "a,b",
        "qk": None,
    }
    assert arch.parse_architecture("timm:vit_tiny_patch16_224.augreg_in21k").name == "vit_tiny_patch16_224.augreg_in21k"
    assert not arch.parse_architecture("timm:x,pretrained=False").pretrained


@pytest.mark.parametrize(("text", "message"), [
    ("keras:x", "expected timm:NAME"), ("timm:", "expected timm:NAME"), ("timm:x,depth", "neither key=value"),
    ("timm:x,depth=(1", "unbalanced"), ("timm:x,depth=1+len('a')", "not a Python literal"),
    ("timm:x,1=2", "neither key=value"),
    ("timm:x,depth=__import__('os')", "not a Python literal"),
    ("timm:x,checkpoint_path='a.pth'", "checkpoint_path is not accepted"),
])
def test_malformed_specification(text: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        arch.parse_architecture(text)


@pytest.mark.parametrize(("text", "message"), [
    ("timm:vit_tinny_patch16_224", "close: .*vit_tiny_patch16_224"), ("timm:hf-hub:someone/model", "no model"),
    ("timm:vit_tiny_patch16_224,dept=2", "no option 'dept'"),
    ("timm:vit_tiny_patch16_224,num_heads=7,embed_dim=32", "cannot be built|num_heads"),
    ("torchvision:vit_b_17", "vit_b_16"), ("torchvision:resnet18,weights=DEFAULT", "pretrained"),
])
def test_architecture_that_cannot_be_built(text: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        arch.build(arch.parse_architecture(text))


@pytest.mark.parametrize(("text", "shape"), [
    ("timm:vit_tiny_patch16_224,depth=1,embed_dim=24,img_size=32,in_chans=1", (2, 1, 32, 32)),
    # its convolutions read frequencies, not pixels
    ("timm:csatv2,depths=(1,1,1,1),transformer_depths=(0,0,0,1)", (2, 3, 512, 512)),
    ("timm:swin_tiny_patch4_window7_224,depths=(1,1),num_heads=(1,1),embed_dim=24,img_size=(32,64),window_size=4",
     (2, 3, 32, 64)),
    ("timm:resnet10t", (2, 3, 176, 176)),
])
def test_timm_inputs_fit_the_model(text: str, shape: tuple[int, ...]) -> None:
    model = arch.build(arch.parse_architecture(text))
    (images,) = arch.example_inputs(model)
    assert images.shape == shape and not model.training
    assert torch.equal(images, arch.example_inputs(model)[0])
    with torch.no_grad():
        assert model(images).shape[0] == 2
    found = arch.preprocessing(model)
    assert found is not None and found["input_size"] == list(shape[1:])
    assert json.loads(json.dumps(found)) == found


def test_input_shape_has_no_batch_and_overrides() -> None:
    module = nn.Linear(5, 2)
    assert arch.example_inputs(module, (7, 5))[0].shape == (2, 7, 5)
    model = arch.build(arch.parse_architecture("timm:resnet10t"))
    assert arch.example_inputs(model, [3, 64, 48])[0].shape == (2, 3, 64, 48)
    with pytest.raises(InputError, match="--input-shape"):
        arch.example_inputs(module)
    with pytest.raises(InputError, match="positive"):
        arch.example_inputs(module, (0, 3))
    assert arch.preprocessing(module) is None


def test_preprocessing_of_a_transformers_model_without_an_image_processor() -> None:
    import transformers as t

    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    found = arch.preprocessing(t.ViTModel(t.ViTConfig(**width, image_size=32, patch_size=16)))
    assert found is not None and found["input_size"] == [3, 32, 32] and found["mean"] == [0.5, 0.5, 0.5]
    assert arch.preprocessing(t.LlamaForCausalLM(t.LlamaConfig(**width, vocab_size=9))) is None


@pytest.mark.parametrize("option", ["depth=100000000", "depths=(2, 10**9, 2)", f"embed_dim={10**30}"])
def test_numbers_that_no_model_has(option: str) -> None:
    """A list of that length is made before anything can be measured."""
    with pytest.raises(ModelFileError, match=r"more than any model has|is not a Python literal"):
        arch.parse_architecture(f"timm:vit_tiny_patch16_224,{option}")
