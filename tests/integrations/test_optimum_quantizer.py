"""A quantizer in the form of optimum's; see also `tests/cli/test_optimum.py`, which loads such directories."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from compiled import PLAIN
from language import save

from repquant_fx import InputError, Recipe

pytest.importorskip("optimum", reason="pip install optimum")
from repquant_fx.integrations.optimum import RepQuantizer, columns, recipe_of

IDS = torch.randint(3, 80, (16, 12), generator=torch.Generator().manual_seed(0))


class Columns(dict):
    """A data set as that of `datasets`: columns of lists."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_a_directory_is_written(tmp_path: Path) -> None:
    save("bert", tmp_path / "bert", with_tokenizer=True)
    quantizer = RepQuantizer.from_pretrained(tmp_path / "bert", task="text-classification")
    data = Columns(input_ids=IDS.tolist(), text=["words"] * 16)
    path = quantizer.quantize(tmp_path / "out", quantization_config=Recipe(**PLAIN), dataset=data, num_samples=12)
    assert path == tmp_path / "out/model.onnx"
    assert {"config.json", "tokenizer.json"} <= {each.name for each in (tmp_path / "out").iterdir()}
    assert [value.name for value in onnx.load(path).graph.output] == ["logits"]


def test_configurations_of_optimum_give_their_bits() -> None:
    types = {name: SimpleNamespace(name=name) for name in ("QInt8", "QUInt8", "QInt4", "QFLOAT8E4M3FN")}
    static = SimpleNamespace(is_static=True, weights_dtype=types["QInt4"], activations_dtype=types["QUInt8"])
    assert recipe_of(static) == Recipe(wbits=4, abits=8)
    assert recipe_of(None) is None and recipe_of("recipe.yaml") == "recipe.yaml"
    with pytest.raises(InputError, match="dynamic quantization"):
        recipe_of(SimpleNamespace(is_static=False))
    static.weights_dtype = types["QFLOAT8E4M3FN"]
    with pytest.raises(InputError, match="weights_dtype is"):
        recipe_of(static)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the transformers model"):
        RepQuantizer.from_pretrained(tmp_path, file_name="model.onnx")
    with pytest.raises(InputError, match="always called"):
        RepQuantizer.from_pretrained(tmp_path).quantize(tmp_path, file_prefix="q")
    assert columns(IDS) is IDS and list(columns(Columns(a=[1, 2], b=["x", "y"]))) == ["a"]
