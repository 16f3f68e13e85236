"""Properties: whatever the bytes, a loader gives a value or one InputError. Never another exception, and nothing runs.
"""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import archive_of, damages, records_of, torch_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from repquant_fx.calibration.arrays import read_arrays
from repquant_fx.calibration.images import ImageReader, Unreadable
from repquant_fx.calibration.text import read_text
from repquant_fx.cli.common import read_shape
from repquant_fx.errors import InputError
from repquant_fx.frontends.architectures import parse_architecture
from repquant_fx.frontends.loading import load_model
from repquant_fx.recipe import Recipe

ARCH = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=12,num_heads=3,depth=1,num_classes=2"


def few(examples: int) -> Callable[[Any], Any]:
    """The same few examples in each run; the one folder of a test serves them all."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def refused(call: Callable[[], object]) -> str | None:
    """The message of an InputError, None where the call succeeds; anything else is a failure of the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except InputError as error:
        assert str(error) and len(str(error)) < 5000
        return str(error)
    return None


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x)).reshape(x.shape[0], -1)


@functools.cache
def whole(kind: str) -> bytes:
    """A sound model file."""
    if kind == "pt2":
        buffer = io.BytesIO()
        torch.export.save(
            torch.export.export(
                Tiny().eval(), (torch.randn(2, 6, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            ),
            buffer,
        )
        return buffer.getvalue()
    import safetensors.torch
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, num_heads=3, depth=1, num_classes=2
    )
    if kind == "safetensors":
        return bytes(safetensors.torch.save(model.state_dict(), {"arch": ARCH}))
    return torch_file(
        model if kind == "module" else model.state_dict(), _use_new_zipfile_serialization=kind != "legacy"
    )


def arch_for(kind: str) -> str | None:
    return ARCH if kind in ("weights", "legacy") else None


@pytest.mark.parametrize("kind", ["weights", "legacy", "module", "safetensors", "pt2"])
def test_sound_files_load(kind: str, tmp_path: Path) -> None:
    """What the damage below is done to."""
    (tmp_path / "m").write_bytes(whole(kind))
    assert refused(lambda: load_model(tmp_path / "m", arch=arch_for(kind))) is None


@pytest.mark.parametrize("kind", ["weights", "legacy", "module", "safetensors", "pt2"])
@few(12)
@given(damage=damages())
def test_a_damaged_model_file_loads_or_is_refused(kind: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(damage(whole(kind)))
    refused(lambda: load_model(tmp_path / "m", arch=arch_for(kind)))


@pytest.mark.parametrize(
    "kind, record",
    [
        ("module", "data.pkl"),
        ("weights", "data.pkl"),
        ("pt2", "models/model.json"),
        ("pt2", "data/weights/model_weights_config.json"),
        ("pt2", "data/sample_inputs/model.pt"),
    ],
)
@few(15)
@given(damage=damages())
def test_a_damaged_record_in_a_sound_archive(
    kind: str, record: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    records = records_of(whole(kind))
    (tmp_path / "m").write_bytes(archive_of({**records, record: damage(records[record])}))
    refused(lambda: load_model(tmp_path / "m", arch=arch_for(kind)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in items for place in places(item, (*path, key))]


@pytest.mark.parametrize("record", ["models/model.json", "data/weights/model_weights_config.json"])
@few(25)
@given(data=st.data())
def test_any_value_anywhere_in_a_program(record: str, data: st.DataObject, tmp_path: Path) -> None:
    records = records_of(whole("pt2"))
    document = json.loads(records[record])
    *way, last = data.draw(st.sampled_from([place for place in places(document) if place]))
    target = document
    for key in way:
        target = target[key]
    target[last] = data.draw(JSON)
    (tmp_path / "m").write_bytes(archive_of({**records, record: json.dumps(document).encode()}))
    refused(lambda: load_model(tmp_path / "m"))


@functools.cache
def arrays(suffix: str) -> bytes:
    buffer, values = io.BytesIO(), np.arange(48, dtype=np.float32).reshape(4, 3, 2, 2)
    if suffix == ".npy":
        np.save(buffer, values)
    elif suffix == ".npz":
        np.savez_compressed(buffer, x=values)
    elif suffix == ".pt":
        return torch_file({"x": torch.from_numpy(values)})
    else:
        import safetensors.torch

        return bytes(safetensors.torch.save({"x": torch.from_numpy(values)}))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@few(40)
@given(damage=damages())
def test_damaged_arrays(suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(arrays(suffix)))
    refused(lambda: read_arrays(path))


@functools.cache
def picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
@few(20)
@given(damage=damages())
def test_damaged_images(kind: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(damage(picture(kind)))
    row = ImageReader(None, (3, 8, 8))(path)
    assert isinstance(row, Unreadable) or (row.shape == (3, 8, 8) and bool(torch.isfinite(row).all()))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@few(60)
@given(data=st.binary(max_size=60) | st.text(alphabet='[]{}":,text_pair0\\ud \n', max_size=60).map(str.encode))
def test_any_text(suffix: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(data)
    refused(lambda: read_text(path))


SETTINGS = st.sampled_from([*Recipe.__dataclass_fields__, "wbit", "", "match"])
VALUES = JSON | st.sampled_from(
    [4, 8, "log2", "search", True, ["values"], [{"match": "a*", "wbits": 4}], [{"match": "a", "wbits": "x"}]]
)


@few(150)
@given(table=st.dictionaries(SETTINGS, VALUES, max_size=4))
def test_any_table_is_a_recipe_or_refused(table: dict[str, Any]) -> None:
    found: list[Recipe] = []
    if refused(lambda: found.append(Recipe.from_dict(table))) is None:
        assert Recipe.from_dict(found[0].to_dict()) == found[0]


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
@few(150)
@given(text=st.text(max_size=60) | st.text(alphabet="&*<:[]{}!|>-?#%@'\" \nab=.1", max_size=60))
def test_any_text_is_a_recipe_or_refused(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: Recipe.from_file(path))


@few(150)
@given(options=st.text(alphabet="abc_=,()[]{}'\"1e9.-: \0", max_size=40))
def test_any_architecture_parses_or_is_refused(options: str) -> None:
    found: list[Any] = []
    if refused(lambda: found.append(parse_architecture(f"timm:vit,{options}"))) is None:
        assert not found[0].pretrained


@few(80)
@given(text=st.text(max_size=12) | st.text(alphabet="0123456789,x-_ ", max_size=12))
def test_any_shape_is_positive_or_refused(text: str) -> None:
    found: list[Any] = []
    if refused(lambda: found.append(read_shape(text))) is None:
        assert all(size > 0 for size in found[0])
