"""Files of torch.save: the models people save load without consent, and nothing that a hostile file says is executed.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repquant_fx.errors import ModelFileError
from repquant_fx.frontends.pickled import InertPartial, load_pickled
from repquant_fx.frontends.rehearsal import rehearse


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class Reduced:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def image_models() -> dict[str, Callable[[], nn.Module]]:
    import timm
    import torchvision

    small: dict[str, Any] = {"embed_dim": 24, "img_size": 32}
    return {
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, num_heads=3, **small),
        "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_heads=3, **small),
        "swin": lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 1), window_size=4, **small
        ),
        "torchvision": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8),
        "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()),
    }


@pytest.mark.parametrize("name", ["vit", "deit", "swin", "torchvision", "convolutions"])
def test_image_model_loads_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = image_models()[name]().eval()
    loaded = load_pickled(saved(model), "m.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert type(loaded) is type(model)


def test_transformer_encoder_and_data_parallel_load() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.DataParallel(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(load_pickled(saved(model), "m.pt")(x), model(x))


def hub_models() -> dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]]:
    import transformers as t

    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids, images = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.randn(2, 3, 32, 32)
    vision = {**width, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    text = {**width, "intermediate_size": 16, "vocab_size": 32, "eos_token_id": 2, "bos_token_id": 1}
    return {
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**vision)), (images,)),
        "opt": lambda: (
            t.OPTForCausalLM(t.OPTConfig(**width, ffn_dim=16, vocab_size=32, word_embed_proj_dim=16)),
            (ids,),
        ),
        "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**text)), (ids,)),
        "clip": lambda: (t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)), (ids, images)),
    }


@pytest.mark.parametrize("name", ["vit", "opt", "llama", "clip"])
def test_transformers_model_loads_and_computes_the_same(name: str) -> None:
    model, inputs = hub_models()[name]()
    loaded = load_pickled(saved(model.eval()), "m.pt")
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], model(*inputs)[0])


def test_state_dict_and_tensor_with_attributes_load_from_both_formats() -> None:
    tensor = torch.arange(4.0)
    tensor.mark = True  # type: ignore[attr-defined]
    for zipped in (True, False):
        data = saved({"state_dict": {"a": tensor}, "epoch": 3}, _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_pickled(data, "s.pt")["state_dict"]["a"], tensor)


def sentinel_call(sentinel: Path) -> Reduced:
    return Reduced(os.system, f"echo ran > {sentinel}")


def module_with(**attributes: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    vars(module).update(attributes)
    return module


def hostile_values(sentinel: Path) -> dict[str, tuple[Any, str]]:
    script = f"open({str(sentinel)!r}, 'w').write('ran')"
    return {
        "os.system": (sentinel_call(sentinel), r"posix\.system|os\.system"),
        "in a module": (module_with(act=sentinel_call(sentinel)), "system"),
        "in a state dict": ({"a": torch.ones(1), "b": sentinel_call(sentinel)}, "system"),
        "behind partial": (module_with(act_layer=functools.partial(os.system, f"echo ran > {sentinel}")), "system"),
        "eval": (Reduced(eval, script), r"builtins\.eval"),
        "exec": (module_with(x=Reduced(exec, script)), r"builtins\.exec"),
        "getattr": (Reduced(getattr, 1, "real"), r"builtins\.getattr"),
        "graph module": (torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), "graph_module"),
        "hub": (Reduced(torch.hub.load, "a/b", "c"), r"torch\.hub\.load"),
        "import of another package": (Reduced(pickle.loads, b"N."), "pickle"),
    }


HOSTILE = [
    "os.system",
    "in a module",
    "in a state dict",
    "behind partial",
    "eval",
    "exec",
    "getattr",
    "graph module",
    "hub",
    "import of another package",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_by_name_and_does_not_run(name: str, zipped: bool, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    value, message = hostile_values(sentinel)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = saved(value, _use_new_zipfile_serialization=zipped)
    expected = message if zipped else f"{message}|before torch 1.6"
    with pytest.raises(ModelFileError, match=expected):
        load_pickled(data, "evil.pt")
    assert not sentinel.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """With consent the same file runs: otherwise the tests above would prove nothing."""
    sentinel = tmp_path / "ran"
    load_pickled(saved(sentinel_call(sentinel)), "evil.pt", allow_pickle=True)
    assert sentinel.exists()


def test_constructors_are_not_called() -> None:
    with pytest.raises(ModelFileError, match="calls Linear"):
        load_pickled(saved(Reduced(nn.Linear, 2, 2)), "m.pt")
    with pytest.raises(ModelFileError, match="calls Linear"):
        load_pickled(_reduce_to("torch.nn.modules.linear", "Linear"), "m.pt")


def _reduce_to(module: str, name: str) -> bytes:
    """A torch.save file whose pickle calls `module.name()`."""
    buffer = io.BytesIO()
    with_call = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    writer = torch._C.PyTorchFileWriter(buffer)
    writer.write_record("data.pkl", with_call, len(with_call))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return buffer.getvalue()


@pytest.mark.parametrize(
    "path",
    [
        "timm.models.vision_transformer.partial",
        "timm.models._helpers.load_state_dict",
        "torchvision.models.get_model",
        "torch.nn.modules.module._WrappedHook",
        "timm.layers.os",
    ],
)
def test_admitted_packages_do_not_admit_their_functions_and_imports(path: str) -> None:
    module, _, name = path.rpartition(".")
    with pytest.raises(ModelFileError, match="not known to be harmless"):
        load_pickled(_reduce_to(module, name), "m.pt")


def test_rebuild_of_a_tensor_may_not_call_something_else() -> None:
    """torch's own unpickler would call the first argument."""
    gelu = nn.functional.gelu
    value = Reduced(torch._tensor._rebuild_from_type_v2, gelu, torch.Tensor, (torch.ones(1),), {})
    with pytest.raises(ModelFileError, match="_rebuild_from_type_v2"):
        load_pickled(saved(value), "m.pt")


def test_partial_is_held_and_not_called() -> None:
    loaded = load_pickled(saved(module_with(norm_layer=functools.partial(nn.LayerNorm, eps=1e-3))), "m.pt")
    assert isinstance(loaded.norm_layer, InertPartial) and loaded.norm_layer.keywords == {"eps": 1e-3}
    with pytest.raises(ModelFileError, match="--allow-pickle"):
        loaded.norm_layer(4)
    assert torch.equal(loaded(torch.ones(1, 2)), loaded[0](torch.ones(1, 2)))


def test_hooks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(nn.functional.gelu)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match="hooks"):
        load_pickled(saved(model), "m.pt")


def test_attention_from_a_repository_is_refused() -> None:
    model, _ = hub_models()["vit"]()
    vars(model.config)["_attn_implementation_internal"] = "someone/kernels"
    with pytest.raises(ModelFileError, match="someone/kernels"):
        load_pickled(saved(model), "m.pt")


def test_damaged_pickle_and_missing_package_are_named() -> None:
    buffer = bytearray(_reduce_to("torch", "Size"))
    where = buffer.index(b")R.")
    buffer[where : where + 3] = b"RRR"
    with pytest.raises(ModelFileError):
        load_pickled(bytes(buffer), "m.pt")
    with pytest.raises(ModelFileError, match="nowhere_to_be_found"):
        load_pickled(_reduce_to("nowhere_to_be_found", "Net"), "m.pt", allow_pickle=True)


def test_globals_are_listed_without_executing(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    assert "posix.system" in rehearse(saved(sentinel_call(sentinel)))[0]
    assert not sentinel.exists()
