"""load_model: each source gives the same model that was saved, and each broken one a message that says what it is."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.loading import load_model

SPEC = "timm:vit_tiny_patch16_224,depth=1,embed_dim=24,num_heads=3,img_size=32"


def model() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=32).eval()


def same(found: nn.Module | None, expected: nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return found is not None and torch.equal(found(images), expected(images))


def test_named_architecture() -> None:
    loaded = load_model(SPEC)
    assert (
        loaded.module is not None
        and loaded.exported is None
        and not loaded.module.training
        and not loaded.inputs_are_data
    )
    assert loaded.example_inputs[0].shape == (2, 3, 32, 32) and loaded.preprocessing is not None
    assert "vit_tiny" in loaded.source


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.safetensors", "noise"])
def test_pickled_module_whatever_its_suffix(name: str, tmp_path: Path) -> None:
    torch.save(nn.DataParallel(model()), tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert (
        same(loaded.module, model())
        and loaded.preprocessing is not None
        and loaded.preprocessing["input_size"] == [3, 32, 32]
    )


@pytest.mark.parametrize("key", [None, "state_dict", "model", "module", "model_state_dict", "model_ema"])
def test_state_dict(key: str | None, tmp_path: Path) -> None:
    weights = model().state_dict()
    torch.save(weights if key is None else {"epoch": 1, key: weights}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", arch=SPEC)
    assert same(loaded.module, model()) and str(tmp_path / "w.pt") in loaded.source


def test_state_dict_of_data_parallel_and_module_in_a_checkpoint(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(model()).state_dict(), tmp_path / "w.pt")
    torch.save({"model": model(), "epoch": 2}, tmp_path / "c.pt")
    assert same(load_model(tmp_path / "w.pt", arch=SPEC).module, model())
    assert same(load_model(tmp_path / "c.pt").module, model())


def test_safetensors_with_and_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    safetensors.torch.save_file(model().state_dict(), path, metadata={"arch": SPEC})
    assert same(load_model(path).module, model())
    safetensors.torch.save_file(model().state_dict(), path)
    assert same(load_model(path, arch=SPEC).module, model())
    with pytest.raises(ModelFileError, match=r"20 tensors \(blocks\.0\.attn\.proj\.bias, .* and 12 more\).*--arch"):
        load_model(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    weights = model().state_dict()
    weights["head.weight"] = torch.zeros(7, 24)
    weights["stranger"] = weights.pop("norm.bias")
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ModelFileError) as caught:
        load_model(tmp_path / "w.pt", arch=SPEC)
    for part in ("1 missing: norm.bias", "1 unexpected: stranger", "head.weight is [7, 24] instead of [1000, 24]"):
        assert part in str(caught.value)


def test_exported_program(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.export.save(torch.export.export(model(), (images,)), tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2")
    assert loaded.module is None and loaded.exported is not None and loaded.inputs_are_data
    assert torch.equal(loaded.example_inputs[0], images)
    with pytest.raises(InputError, match="--input-shape"):
        load_model(tmp_path / "m.pt2", input_shape=(3, 32, 32))
    with pytest.raises(InputError, match="whole model"):
        load_model(tmp_path / "m.pt2", arch=SPEC)


def test_architecture_with_a_whole_model(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "m.pt")
    for source in (str(tmp_path / "m.pt"), SPEC):
        with pytest.raises(InputError, match="whole model"):
            load_model(source, arch=SPEC)


def test_consent_loads_a_class_of_the_user(tmp_path: Path) -> None:
    torch.save(Custom(), tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match=r"Custom.*--allow-pickle"):
        load_model(tmp_path / "m.pt", input_shape=(4,))
    loaded = load_model(tmp_path / "m.pt", input_shape=(4,), allow_pickle=True)
    assert isinstance(loaded.module, Custom) and loaded.example_inputs[0].shape == (2, 4) and not loaded.module.training


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_half_precision_is_raised(tmp_path: Path) -> None:
    torch.save(model().half(), tmp_path / "m.pt")
    found = load_model(tmp_path / "m.pt").module
    assert found is not None and same(found, model().half().float())


def test_module_that_contains_itself(tmp_path: Path) -> None:
    loop = nn.Sequential(nn.Linear(2, 2))
    loop._modules["1"] = loop
    torch.save(loop, tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match="inside itself"):
        load_model(tmp_path / "m.pt", input_shape=(2,))


def test_loaded_modules_can_be_captured(tmp_path: Path) -> None:
    import torchvision

    from repquant_fx.frontends.capture import capture

    torch.save(torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8), tmp_path / "m.pt")  # holds partial(LayerNorm)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.module is not None and capture(copy.deepcopy(loaded.module), loaded.example_inputs).dynamic_batch


def test_broken_weights_are_named_and_masks_are_not_broken(tmp_path: Path) -> None:
    broken = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    broken[1].weight.data[0, 0] = float("nan")
    torch.save(broken, tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match=r"NaN or infinite weights in 1\.weight;"):
        load_model(tmp_path / "m.pt", input_shape=(2,))
    masked = nn.Sequential(nn.Linear(2, 2))
    masked.register_buffer("mask", torch.full((2, 2), -torch.inf))
    torch.save(masked, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt", input_shape=(2,)).module is not None


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def truncated_model() -> bytes:
    buffer = io.BytesIO()
    torch.save(model(), buffer)
    return buffer.getvalue()[:20_000]


NOT_MODELS = {
    "empty": (b"", "is empty"),
    "text": (b"hello, I am no model\nat all", "a text file that begins 'hello"),
    "noise": (bytes(range(200, 256)) * 9, "begins with the bytes c8 c9"),
    "truncated": (truncated_model(), "truncated or damaged"),
    "zip": (zipped(("readme.txt", b"x")), "without a model; it holds readme.txt"),
    "torchscript": (zipped(("m/data.pkl", b"N."), ("m/constants.pkl", b"N."), ("m/code/x.py", b"")), "TorchScript"),
    "older program": (zipped(("serialized_exported_program.json", b"{}")), "before torch 2.8"),
    "plain pickle": (pickle.dumps({"a": 1}), "plain Python pickle"),
    "safetensors": (safetensors.torch.save({"a": torch.ones(9)})[:-8], "like safetensors but is truncated"),
}


@pytest.mark.parametrize("kind", list(NOT_MODELS))
@pytest.mark.parametrize("consent", [False, True])
def test_what_is_not_a_model(kind: str, consent: bool, tmp_path: Path) -> None:
    data, message = NOT_MODELS[kind]
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "m.pt", allow_pickle=consent)


def test_missing_file_directory_onnx_and_other_contents(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        load_model(tmp_path / "nowhere.pt")
    with pytest.raises(ModelFileError, match="directory"):
        load_model(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch:\x00")
    with pytest.raises(ModelFileError, match="ONNX model"):
        load_model(tmp_path / "m.onnx")
    torch.save([1, 2], tmp_path / "l.pt")
    with pytest.raises(ModelFileError, match="holds a list"):
        load_model(tmp_path / "l.pt")
    torch.save({"epoch": 3}, tmp_path / "d.pt")
    with pytest.raises(ModelFileError, match="its keys are epoch"):
        load_model(tmp_path / "d.pt")


def test_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    data = bytearray(zipped(("m/data.pkl", bytes(100_000)), compression=zipfile.ZIP_DEFLATED))
    where = data.index(b"PK\x01\x02") + 24
    data[where : where + 4] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(ModelFileError, match=f"would unpack to {3 << 30}"):
        load_model(tmp_path / "m.pt")
