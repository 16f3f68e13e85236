"""Evaluation: accuracies that are known beforehand, in torch and in ONNX Runtime, and faults that are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from repquant_fx.errors import CalibrationError, InputError, ModelFileError
from repquant_fx.evaluation import (
    Accuracy,
    accuracy_of,
    evaluate,
    labelled_folder,
    preprocessing_from_onnx,
    runners,
)
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.options import Source

SIZE = (3, 4, 4)
PLAIN = {
    "input_size": SIZE,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
COLOURS = {"a_red": (250, 0, 0), "b_green": (0, 250, 0), "c_blue": (0, 0, 250)}


class Colours(nn.Module):
    """Outputs the mean of each channel: a perfect classifier of red, green and blue."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def write_folder(root: Path, counts: tuple[int, ...] = (5, 4, 2), wrong: int = 0) -> Path:
    """Red, green and blue images in class folders; the first `wrong` of the red ones are blue."""
    for (name, colour), count in zip(COLOURS.items(), counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            shown = COLOURS["c_blue"] if name == "a_red" and i < wrong else colour
            Image.new("RGB", (6, 6), shown).save(root / name / f"{i}.png")
    return root


def write_onnx(
    path: Path, batch: int | str = "N", preprocessing: object = PLAIN, outputs: int = 3, reduced: str = "23"
) -> str:
    """Channel means as an ONNX file: output (N, 3), or fewer dimensions by `reduced`."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [len(reduced)], [int(c) for c in reduced])
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0)]
    shape = [batch, *(d for i, d in enumerate(SIZE, 1) if str(i) not in reduced)]
    if outputs < 3:
        nodes.append(helper.make_node("Split", ["means"], ["y", "rest"], axis=1, num_outputs=2))
        shape[1] = 2
    else:
        nodes.append(helper.make_node("Identity", ["means"], ["y"]))
    graph = helper.make_graph(nodes, "colours", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *SIZE])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if preprocessing is not None:
        text = preprocessing if isinstance(preprocessing, str) else json.dumps(preprocessing)
        helper.set_model_props(model, {"repquant_fx.preprocessing": text, "other": "1"})
    onnx.save(model, path)
    return str(path)


@pytest.fixture
def torch_source(monkeypatch) -> Callable[..., None]:
    """Puts a model where `evaluate` loads it from; records the arguments."""
    def install(module: object = None, exported: object = None, preprocessing: object = PLAIN, batch: int = 2,
                inputs: int = 1) -> None:
        def load_source(source):
            assert source == Source("some.pt", "timm:x", allow_pickle=True)
            examples = (torch.zeros(batch, *SIZE),) * inputs
            return LoadedModel(module, exported, examples, False, preprocessing, "some.pt")

        monkeypatch.setattr(runners, "load_source", load_source)

    return install


def evaluate_torch(data: Path, **options) -> Accuracy:
    return evaluate("some.pt", str(data), arch="timm:x", allow_pickle=True, **options)


# ---- accuracy_of -----------------------------------------------------------------------------------------------------


def test_top1_and_top5_of_known_ranks():
    ranks = torch.tensor([0, 0, 1, 4, 5, 9])  # how many outputs are larger than that of the label
    labels = torch.tensor([0, 9, 3, 4, 5, 2])
    outputs = torch.stack([torch.arange(10).float().roll(int(label + rank + 1)) for label, rank in zip(labels, ranks)])
    for row, label, rank in zip(outputs, labels, ranks):
        assert int((row > row[label]).sum()) == rank
    batches = [(outputs[:4], labels[:4]), (outputs[4:], labels[4:].to(torch.int32))]
    assert accuracy_of(lambda x: x, batches) == Accuracy(pytest.approx(200 / 6), pytest.approx(400 / 6), 6, 10)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 9), st.integers(0, 1000))
def test_accuracy_does_not_depend_on_the_batches(count, classes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs, labels = (
        torch.randn(count, classes, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )
    whole = accuracy_of(lambda x: x, [(outputs, labels)])
    split = accuracy_of(lambda x: x, zip(outputs.split(size), labels.split(size)))
    assert whole == split and whole.samples == count and whole.classes == classes
    assert whole.top1 == pytest.approx(100 * float((outputs.argmax(1) == labels).float().mean()))
    assert whole.top1 <= whole.top5 and (classes > 5 or whole.top5 == 100)


@pytest.mark.parametrize(("outputs", "labels", "message"), [
    (torch.zeros(4), torch.zeros(4).long(), "for classifiers"),
    (torch.zeros(4, 3, 2), torch.zeros(4).long(), "for classifiers"),
    (torch.zeros(3, 3), torch.zeros(4).long(), "for a batch of 4"),
    ([1, 2], torch.zeros(4).long(), "gave list"),
    (torch.full((4, 3), float("nan")), torch.zeros(4).long(), "NaN"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels go from 0 to 3"),
    (torch.zeros(4, 3), torch.tensor([0, -1, 2, 2]), "labels go from -1 to 2"),
    (torch.zeros(4, 3), torch.zeros(3).long(), "4 images"),
])
def test_outputs_and_labels_that_do_not_fit(outputs, labels, message):
    with pytest.raises(InputError, match=message):
        accuracy_of(lambda x: outputs, [(torch.zeros(4, 1), labels)])


def test_no_samples():
    with pytest.raises(InputError, match="no samples"):
        accuracy_of(lambda x: x, [])


# ---- labelled_folder -------------------------------------------------------------------------------------------------


def test_labels_are_the_sorted_folder_names(tmp_path):
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path)
    (tmp_path / "stray.png").write_bytes(b"in no class")
    (tmp_path / ".hidden").mkdir()
    stream = labelled_folder(tmp_path, PLAIN, SIZE, 4)
    batches = list(stream)
    assert [len(labels) for _, labels in batches] == [4, 4, 3] and len(stream) == 3 and stream.samples == 11
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    (tmp_path / ".hidden").rmdir()
    reference = ImageFolder(str(tmp_path))
    assert stream.classes == reference.classes and labels.tolist() == reference.targets
    assert images.shape == (11, *SIZE) and images.dtype == torch.float32
    assert images.mean((2, 3)).argmax(1).tolist() == labels.tolist()
    assert torch.equal(torch.cat([b[0] for b in stream]), images)  # a second pass


def test_class_folders_sort_as_text(tmp_path):
    names = [str(n) for n in (10, 9, 100, 2, 33, 1, 20, 8)] + ["b", "B", "a"]
    for name in names:
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "2" / "x.png")
    stream = labelled_folder(tmp_path, PLAIN, SIZE)
    assert stream.classes == ["1", "10", "100", "2", "20", "33", "8", "9", "B", "a", "b"]
    assert [label for _, label in stream.files] == [3]  # an empty class folder keeps its number


def test_a_limit_picks_a_seeded_subset(tmp_path):
    write_folder(tmp_path, (20, 20, 20))
    chosen = [labelled_folder(tmp_path, PLAIN, 4, limit=9, seed=seed).files for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(c) == len(set(c)) == 9 for c in chosen)
    assert chosen[0] == sorted(chosen[0]) and len({label for _, label in chosen[0]}) > 1
    assert labelled_folder(tmp_path, PLAIN, 4, limit=999).samples == 60


def test_decoding_is_lazy_and_names_what_it_cannot_read(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "c_blue" / "0.png").write_bytes(b"noise")
    stream = iter(labelled_folder(tmp_path, PLAIN, SIZE, 4))
    next(stream), next(stream)
    with pytest.raises(CalibrationError, match=r"c_blue.*0\.png"):
        next(stream)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match="does not exist"):
        labelled_folder(tmp_path / "none", PLAIN, SIZE)
    with pytest.raises(InputError, match="is not a folder"):
        labelled_folder(tmp_path / "file.txt", PLAIN, SIZE)
    with pytest.raises(InputError, match="no class folders"):
        labelled_folder(tmp_path, PLAIN, SIZE)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no images"):
        labelled_folder(tmp_path, PLAIN, SIZE)
    with pytest.raises(InputError, match="at least 1"):
        labelled_folder(tmp_path, PLAIN, SIZE, limit=0)


# ---- evaluate: torch -------------------------------------------------------------------------------------------------


def test_a_module_on_a_folder(tmp_path, torch_source):
    data = write_folder(tmp_path, wrong=2)
    torch_source(Colours())
    threads = torch.get_num_threads()
    assert evaluate_torch(data, batch_size=4, threads=1) == Accuracy(pytest.approx(900 / 11), 100.0, 11, 3)
    assert torch.get_num_threads() == threads
    assert evaluate_torch(data, limit=3).samples == 3


@pytest.mark.parametrize("wrap", [lambda y: (y, y * 0), lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y)])
def test_outputs_that_are_records(tmp_path, torch_source, wrap):
    class Wrapped(Colours):
        def forward(self, x: Tensor) -> Tensor:
            return wrap(super().forward(x))

    torch_source(Wrapped())
    assert evaluate_torch(write_folder(tmp_path)).top1 == 100


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_with_either_batch(tmp_path, torch_source, dynamic):
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    exported = torch.export.export(Colours(), (torch.zeros(4, *SIZE),), dynamic_shapes=shapes)
    torch_source(exported=exported, batch=4)
    assert evaluate_torch(write_folder(tmp_path, wrong=1)) == Accuracy(pytest.approx(1000 / 11), 100.0, 11, 3)


def test_a_model_without_preprocessing_warns(tmp_path, torch_source):
    torch_source(Colours(), preprocessing=None)
    with pytest.warns(UserWarning, match="no image preprocessing"):
        assert evaluate_torch(write_folder(tmp_path)).top1 == 100


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_labelled_arrays(tmp_path, torch_source, suffix):
    labels = torch.arange(3).repeat(4)
    images = torch.zeros(12, *SIZE)
    images[torch.arange(12), labels] = 1
    images[0] = torch.tensor([0, 0, 1.0])[:, None, None]
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, images=images.double().numpy(), labels=labels.numpy().astype(np.uint8))
    else:
        save_file({"images": images, "labels": labels}, path)
    torch_source(Colours())
    assert evaluate_torch(path, batch_size=5) == Accuracy(pytest.approx(1100 / 12), 100.0, 12, 3)
    assert evaluate_torch(path, limit=4).samples == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, *SIZE), np.uint8), "labels": np.zeros(2, int)}, "images that are not preprocessed"),
        ({"images": np.zeros((2, 3, 5, 5), np.float32), "labels": np.zeros(2, int)}, r"expects shape \(N, 3, 4, 4\)"),
        ({"images": np.zeros((2, *SIZE), np.float32), "labels": np.zeros(3, int)}, "labels must be 2 integers"),
        ({"images": np.zeros((2, *SIZE), np.float32), "labels": np.zeros(2)}, "found float64"),
        (
            {"images": np.full((2, *SIZE), np.nan, np.float32), "labels": np.zeros(2, int)},
            "NaN or infinite, in samples 0, 1",
        ),
        ({"images": np.zeros((0, *SIZE), np.float32), "labels": np.zeros(0, int)}, "no samples"),
        ({"x": np.zeros(1)}, "needs the arrays images and labels; found x"),
    ],
)
def test_labelled_arrays_that_do_not_fit(tmp_path, torch_source, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    torch_source(Colours())
    with pytest.raises(InputError, match=message):
        evaluate_torch(tmp_path / "data.npz")


def test_data_that_cannot_be_used(tmp_path, torch_source):
    torch_source(Colours())
    with pytest.raises(InputError, match="does not exist"):
        evaluate_torch(tmp_path / "none")
    (tmp_path / "labels.csv").write_text("1")
    with pytest.raises(InputError, match="expected class folders"):
        evaluate_torch(tmp_path / "labels.csv", metric="accuracy")
    for options in ({"batch_size": 0}, {"limit": 0}, {"threads": 0}):
        with pytest.raises(InputError, match="at least 1"):
            evaluate_torch(tmp_path, **options)
    torch_source(Colours(), inputs=2)
    with pytest.raises(InputError, match="one float input"):
        evaluate_torch(tmp_path)


# ---- evaluate: ONNX --------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime() -> None:
    pytest.importorskip("repquant_fx.runtime")


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("batch", ["N", 4, 1])
def test_onnx_with_free_and_fixed_batch(tmp_path, batch):
    data = write_folder(tmp_path / "data", wrong=2)
    source = write_onnx(tmp_path / "m.onnx", batch)
    assert evaluate(source, str(data), batch_size=3, threads=1) == Accuracy(pytest.approx(900 / 11), 100.0, 11, 3)


@pytest.mark.usefixtures("runtime")
def test_onnx_uses_the_stored_preprocessing(tmp_path):
    data = write_folder(tmp_path / "data")
    swapped = dict(PLAIN, mean=(1.0, 0.0, 0.0))  # red is now the darkest, whatever is shown
    assert evaluate(write_onnx(tmp_path / "m.onnx", preprocessing=swapped), str(data)).top1 == pytest.approx(600 / 11)
    with pytest.warns(UserWarning, match="no image preprocessing"):
        assert evaluate(write_onnx(tmp_path / "n.onnx", preprocessing=None), str(data)).top1 == 100


@pytest.mark.usefixtures("runtime")
def test_onnx_that_does_not_fit(tmp_path):
    data = write_folder(tmp_path / "data")
    with pytest.raises(InputError, match="3 class folders, but the model has only 2 outputs"):
        evaluate(write_onnx(tmp_path / "two.onnx", outputs=2), str(data))
    for reduced in ("123", "3"):
        with pytest.raises(InputError, match="for classifiers"):
            evaluate(write_onnx(tmp_path / f"r{reduced}.onnx", reduced=reduced), str(data))


@pytest.mark.usefixtures("runtime")
def test_fewer_folders_than_outputs_are_allowed(tmp_path):
    data = write_folder(tmp_path / "data", counts=(2, 2))
    assert evaluate(write_onnx(tmp_path / "m.onnx"), str(data)) == Accuracy(100.0, 100.0, 4, 3)


def test_preprocessing_from_onnx(tmp_path):
    assert preprocessing_from_onnx(write_onnx(tmp_path / "m.onnx")) == json.loads(json.dumps(PLAIN))
    assert preprocessing_from_onnx(write_onnx(tmp_path / "m.onnx", preprocessing=None)) is None
    for text in ("{", "[1]"):
        with pytest.raises(InputError, match="JSON"):
            preprocessing_from_onnx(write_onnx(tmp_path / "m.onnx", preprocessing=text))
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    for name in ("noise.onnx", "none.onnx"):
        with pytest.raises(ModelFileError, match=name):
            preprocessing_from_onnx(tmp_path / name)
