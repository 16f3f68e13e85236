"""Ways to smuggle code past a loader: none runs. Each attack would leave the file RAN in the current directory."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import COMMAND, archive_of, arrays, npy, records_of, torch_file, torch_zip, zipped
from test_absurd import bert
from test_fuzz import ARCH, whole
from torch import nn

from repquant_fx.calibration.arrays import read_arrays
from repquant_fx.errors import InputError, ModelFileError
from repquant_fx.frontends.huggingface import load_directory
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.pickled import load_pickled
from repquant_fx.frontends.processor import load_preprocessing
from repquant_fx.frontends.tokenizer import load_tokenizer

PICKLE = b"\x80\x02" + COMMAND.encode() + b"."
SCRIPT = "open('RAN', 'w').close()\n"


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


@pytest.fixture(autouse=True)
def _nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "RAN").exists()


def test_the_attack_is_real(tmp_path: Path) -> None:
    """Otherwise no test here would prove anything."""
    pickle.loads(PICKLE)
    assert (tmp_path / "RAN").exists()
    (tmp_path / "RAN").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_pickled(torch_file({"a": Runs()}), "m.pt", allow_pickle=True)
    assert (tmp_path / "RAN").exists()
    (tmp_path / "RAN").unlink()


def twice(first: bytes, second: bytes) -> bytes:
    """An archive with two records of one name, which readers may choose differently."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in (("version", b"3\n"), ("data.pkl", first), ("data.pkl", second), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def indirect() -> bytes:
    """torch's restricted unpickler admits a function that calls what it is given."""
    class Indirect:
        def __reduce__(self) -> Any:
            return torch._tensor._rebuild_from_type_v2, (torch.Tensor.numpy, torch.Tensor, (torch.ones(1),), {})

    return torch_file({"a": Indirect()})


HARMLESS = b"\x80\x02}."
FILES = {
    "a pickle": PICKLE,
    "an archive": torch_zip(PICKLE),
    "in a state dict": torch_file({"a": Runs()}),
    "in the format before 1.6": torch_file({"a": torch.ones(1), "b": Runs()}, _use_new_zipfile_serialization=False),
    "twice, last": twice(HARMLESS, PICKLE),
    "twice, first": twice(PICKLE, HARMLESS),
    "in capitals": torch_zip(HARMLESS, {"DATA.PKL": PICKLE}),
    "beside": torch_zip(HARMLESS, {"constants.pkl": PICKLE}),
    "behind prefix": b"PK" + PICKLE,
    "appended": torch_zip(HARMLESS) + PICKLE,
    "prepended": PICKLE + torch_zip(HARMLESS),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_pickles_wherever_weights_are_read(kind: str, tmp_path: Path) -> None:
    for name in ("m.pt", "m.pt2", "m.safetensors", "m.bin"):
        (tmp_path / name).write_bytes(FILES[kind])
        with pytest.raises(InputError):
            load_model(tmp_path / name, arch=ARCH)
    for name in ("a.pt", "a.npy", "a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(FILES[kind])
        try:  # an empty dict is no array, which its reader says later
            assert arrays(tmp_path / name) == {}
        except InputError:
            pass
    folder = bert(tmp_path / "hub")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(FILES[kind])
    with pytest.raises(InputError):
        load_directory(folder)


def test_calls_by_a_function_that_torch_admits(tmp_path: Path) -> None:
    for name, read in (("m.pt", load_model), ("a.pt", read_arrays)):
        (tmp_path / name).write_bytes(indirect())
        with pytest.raises(InputError, match=r"_rebuild_from_type_v2|not known to be harmless|plain tensors"):
            read(tmp_path / name)


def test_arrays_of_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Runs()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([Runs()], dtype=object))
    (tmp_path / "b.npz").write_bytes(zipped({"x.npy": PICKLE, "y": PICKLE}))
    (tmp_path / "c.npy").write_bytes(npy((1,), "|O", PICKLE))
    for name in ("a.npy", "a.npz", "b.npz", "c.npy"):
        with pytest.raises(InputError, match="plain arrays"):
            arrays(tmp_path / name)


def test_torchscript_is_not_loaded(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "m.pt"))
    for read in (load_model, arrays):
        with pytest.raises(InputError):
            read(tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match="TorchScript"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "record",
    [
        "data/sample_inputs/model.pt",
        "data/weights/weight_0",
        "data/constants/custom_obj_0",
        "extra/x.py",
        "data/weights/model.pt",
        "data/aotinductor/model/x.so",
        "models/other.json",
    ],
)
def test_pickles_in_a_program(record: str, tmp_path: Path) -> None:
    for content in (PICKLE, torch_zip(PICKLE)):
        (tmp_path / "m.pt2").write_bytes(archive_of({**records_of(whole("pt2")), record: content}))
        try:  # bytes of a weight are numbers, and a text beside is nothing
            load_model(tmp_path / "m.pt2")
        except InputError:
            pass
        else:
            assert record in ("data/weights/weight_0", "extra/x.py")


# ---- modules that are data until they are called ---------------------------------------------------------------------


def hub_module(**attributes: Any) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    model: nn.Module = transformers.ViTModel(config).eval()
    vars(model).update(attributes)
    return model


def test_kernels_of_a_repository_wherever_they_are_named() -> None:
    import argparse

    import transformers

    inner = transformers.ViTConfig()
    vars(inner)["_attn_implementation_internal"] = "someone/kernels"
    outer = transformers.CLIPConfig()
    vars(outer)["vision_config"] = inner
    layer = nn.Identity()
    vars(layer)["_attn_implementation"] = "someone/kernels"
    nested = hub_module()
    del vars(nested)["config"]
    nested._modules["config"] = layer  # found by the attribute, and no configuration
    for module in (hub_module(config=inner), hub_module(config=outer), hub_module(settings=inner), nested,
                   hub_module(config=argparse.Namespace(_attn_implementation="someone/kernels:x"))):
        with pytest.raises(ModelFileError, match="someone/kernels"):
            load_pickled(torch_file(module), "m.pt")


def test_a_configuration_inside_itself() -> None:
    import argparse

    config = argparse.Namespace()
    config.config = config
    with pytest.raises(ModelFileError, match="inside itself"):
        load_pickled(torch_file(hub_module(config=config)), "m.pt")


@pytest.mark.parametrize("attribute", ["forward", "__call__", "_call_impl", "__del__"])
def test_methods_that_a_file_replaces(attribute: str) -> None:
    """What it may put there are activations and things that refuse to be called."""
    import functools

    module = nn.Sequential(nn.Linear(2, 2))
    vars(module)[attribute] = functools.partial(os.system, "touch RAN")
    with pytest.raises(ModelFileError, match="system"):
        load_pickled(torch_file(module), "m.pt")


# ---- transformers directories ----------------------------------------------------------------------------------------


def with_code(folder: Path) -> Path:
    for name in (
        "modeling_own.py",
        "configuration_own.py",
        "tokenization_own.py",
        "processing_own.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(SCRIPT)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "configuration_own.C", "AutoModel": "modeling_own.M"}},
        {"model_type": "own"},
        {"architectures": ["modeling_own.M"]},
        {"text_config": {"auto_map": {"AutoConfig": "configuration_own.C"}, "model_type": "own"}},
        {"_attn_implementation": "someone/kernels"},
        {"attn_implementation": "someone/kernels", "use_kernels": True},
        {"hidden_act": "os.system"},
        {"dtype": "os.system"},
        {"quantization_config": {"quant_method": "own", "auto_map": {"x": "modeling_own.M"}}},
        {"trust_remote_code": True, "auto_map": {}},
    ],
    ids=str,
)
def test_code_that_a_configuration_names(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = with_code(bert(tmp_path / "hub", **changes))
    try:
        model, _ = load_directory(folder)
    except InputError:
        return
    assert type(model).__module__.startswith("transformers.models.bert") and model.config._attn_implementation in (
        "sdpa",
        "eager",
    )


def test_code_that_a_tokenizer_or_a_processor_names(tmp_path: Path) -> None:
    folder = with_code(bert(tmp_path / "hub"))
    described: dict[str, Any] = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "vocab.txt").write_bytes(PICKLE)
    with suppress(InputError):  # or a class of transformers itself reads it
        load_tokenizer(folder)
    described = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "processing_own.P"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelFileError, match="code of its own"):
        load_preprocessing(folder, (3, 8, 8))


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """Its library is written in Rust, whose panics are no Exception; a pattern that backtracks without end ends in one.
    """
    from repquant_fx.calibration.text import Tokenization, encode
    from repquant_fx.errors import CalibrationError

    folder = bert(tmp_path / "hub")
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "post_processor": None,
                "decoder": None,
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "t.txt").write_text("a" * 40 + "b\n")
    with pytest.raises(CalibrationError, match="the tokenizer fails"):
        encode(tmp_path / "t.txt", Tokenization(load_tokenizer(folder), 8, False), 4, 0)


@pytest.mark.parametrize("index", [[1], {}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "../../m.safetensors"}},
                                   {"weight_map": {"a": "/dev/zero"}}], ids=str)
def test_indices_of_shards(index: Any, tmp_path: Path) -> None:
    folder = bert(tmp_path / "hub")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=r"index of shards|outside of its directory"):
        load_directory(folder)


def test_a_tensor_that_is_written_out_at_its_claimed_size() -> None:
    """An expanded tensor takes its claimed size when it is rebuilt for another device."""
    class Expanded:
        def __reduce__(self) -> Any:
            tensor = torch.zeros(1).expand(1 << 20)
            return torch._utils._rebuild_device_tensor_from_cpu_tensor, (tensor, torch.float32, "cpu", False)

    with pytest.raises(ModelFileError, match="_rebuild_device_tensor_from"):
        load_pickled(torch_file({"w": Expanded()}), "m.pt")
