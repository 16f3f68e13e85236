"""Calibration data: every form loads what was put in, and every fault is named.

Long because each form of data has its faults.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

from repquant_fx.calibration import images as image_module
from repquant_fx.calibration.batching import CalibrationSet, batch_sizes, plan_batches
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.images import find_images, read_ahead
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import CalibrationError

IMAGE = InputSpec("x", (None, 3, 8, 8), torch.float32)
VECTOR = InputSpec("x", (None, 2), torch.float32)
IDS = InputSpec("input_ids", (None, 4), torch.int64)
MASK = InputSpec("attention_mask", (None, 4), torch.int64)
CONFIG = {
    "input_size": (3, 8, 8),
    "interpolation": "bilinear",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.8,
    "crop_mode": "center",
    "num_classes": 10,
}


def load(spec, inputs=(VECTOR,), preprocessing=None, **options) -> CalibrationSet:
    return load_calibration(spec, list(inputs), preprocessing=preprocessing, **options)


def numbered(count: int) -> torch.Tensor:
    """Sample i is (i, i + 0.5)."""
    return torch.stack([torch.arange(count).float(), torch.arange(count) + 0.5], 1)


def rows(data: CalibrationSet, position: int = 0) -> torch.Tensor:
    return torch.cat([batch[position] for batch in data.batches])


def sizes(data: CalibrationSet) -> list[int]:
    return [len(batch[0]) for batch in data.batches]


def write_images(folder: Path, count: int, size: tuple[int, int] = (12, 10), suffix: str = ".png") -> list[Path]:
    """Images of one colour each, (20 i, 10, 5)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", size, (20 * i % 256, 10, 5)).save(path)
    return paths


# ---- batches ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 40))
def test_batch_sizes_add_up_and_leave_no_single_sample(count, size):
    found = batch_sizes(count, size)
    assert sum(found) == count
    assert all(s == size for s in found[:-1])
    assert not found or 0 < found[-1] <= size + 1
    if size > 1 and count > 1:
        assert 1 not in found


@given(st.lists(st.integers(), max_size=200), st.integers(1, 40))
def test_plan_keeps_every_sample_in_order(order, size):
    plan = plan_batches(order, size)
    assert [i for batch in plan for i in batch] == order
    assert [len(batch) for batch in plan] == batch_sizes(len(order), size)


@given(st.integers(1, 100), st.integers(1, 40))
def test_fixed_plan_has_whole_batches_only(count, size):
    plan = plan_batches(range(count), size, fixed=True)
    assert plan and all(len(batch) == size for batch in plan)
    flat = [i for batch in plan for i in batch]
    assert flat == list(range(count))[:len(flat)] if count >= size else set(flat) == set(range(count))
    assert count - len(flat) < size


@given(st.integers(2, 120), st.integers(1, 17), st.integers(1, 40))
def test_split_loses_and_duplicates_nothing(count, size, held):
    data = load(numbered(count), batch_size=size)
    calibrate, back = data.split_held_back(held)
    assert torch.equal(torch.cat([rows(calibrate), rows(back)]), rows(data))
    assert back.samples == min(held, max(1, count // 4))
    assert sizes(calibrate) == batch_sizes(calibrate.samples, size) and sizes(back) == batch_sizes(back.samples, size)
    assert (back.origin, back.synthetic) == (data.origin, data.synthetic)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 40))
def test_split_with_a_fixed_batch_moves_whole_batches(count, size, held):
    data = load(numbered(count), [InputSpec("x", (size, 2), torch.float32)], batch_size=32)
    calibrate, back = data.split_held_back(held)
    assert set(sizes(data)) == set(sizes(calibrate)) == set(sizes(back)) == {size}
    if len(data.batches) > 1:
        assert torch.equal(torch.cat([rows(calibrate), rows(back)]), rows(data))


def test_split_of_sets_made_by_hand():
    ragged = CalibrationSet([(numbered(3),), (numbered(5) + 10,), (numbered(4) + 20,)], "by hand", False)
    calibrate, back = ragged.split_held_back(3)
    assert (sizes(calibrate), sizes(back)) == ([3, 3, 3], [3])
    assert torch.equal(torch.cat([rows(calibrate), rows(back)]), rows(ragged))
    single = CalibrationSet([(numbered(1),)], "one", False)
    calibrate, back = single.split_held_back(5)
    assert torch.equal(rows(calibrate), numbered(1)) and torch.equal(rows(back), numbered(1))
    with pytest.raises(CalibrationError, match="at least 1"):
        single.split_held_back(0)


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"samples": -3}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(CalibrationError, match="at least 1"):
        load(numbered(4), **options)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def save(path: Path, array: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, array.numpy())
    elif path.suffix == ".npz":
        np.savez(path, x=array.numpy())
    elif path.suffix == ".pt":
        torch.save(array, path)
    else:
        save_file({"x": array}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_files_give_a_seeded_subset(tmp_path, suffix):
    path = save(tmp_path / f"data{suffix}", numbered(50))
    first, again, other = (
        load(str(path), samples=20, batch_size=8),
        load(path, samples=20, batch_size=8),
        load(path, seed=1),
    )
    assert sizes(first) == [8, 8, 4] and first.samples == 20 and not first.synthetic and str(path) in first.origin
    assert torch.equal(rows(first), rows(again))
    chosen = rows(first)[:, 0].int().tolist()
    assert len(set(chosen)) == 20 and chosen != sorted(chosen)
    assert torch.equal(rows(first), numbered(50)[chosen])
    assert rows(other)[:20, 0].int().tolist() != chosen and other.samples == 50


def test_several_inputs_by_name_by_order_and_without_labels(tmp_path):
    ids, mask = torch.arange(24).reshape(6, 4), torch.ones(6, 4, dtype=torch.int64)
    np.savez(tmp_path / "named.npz", attention_mask=mask, input_ids=ids, other=np.zeros(3))
    np.savez(tmp_path / "ordered.npz", ids, mask, labels=np.zeros(6))
    torch.save([ids, mask], tmp_path / "list.pt")
    torch.save({"attention_mask": mask, "input_ids": ids}, tmp_path / "dict.pt")
    for name in ("named.npz", "ordered.npz", "list.pt", "dict.pt"):
        found = load(tmp_path / name, [IDS, MASK], batch_size=4)
        assert sizes(found) == [4, 2]
        assert sorted(rows(found)[:, 0].tolist()) == list(range(0, 24, 4)) and bool((rows(found, 1) == 1).all())
    save_file({"b": ids, "a": mask}, tmp_path / "unnamed.safetensors")
    np.savez(tmp_path / "foreign.npz", a=ids, b=mask)
    for name in ("unnamed.safetensors", "foreign.npz"):
        with pytest.raises(CalibrationError, match="input_ids, attention_mask"):
            load(tmp_path / name, [IDS, MASK])
    np.savez(tmp_path / "half.npz", input_ids=ids, mask=mask)
    with pytest.raises(CalibrationError, match="attention_mask; found input_ids, mask"):
        load(tmp_path / "half.npz", [IDS, MASK])


def test_an_evaluation_file_serves_for_calibration(tmp_path):
    np.savez(tmp_path / "labelled.npz", labels=np.arange(5), images=numbered(5).numpy())
    assert load(tmp_path / "labelled.npz").samples == 5


def test_dtypes_are_converted_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(load(numbered(4).double())).dtype == torch.float32
        big_endian = numbered(4).numpy().astype(">f8")
        assert sorted(rows(load(big_endian))[:, 0].tolist()) == [0, 1, 2, 3]
        assert rows(load(torch.ones(3, 4, dtype=torch.int32), [IDS])).dtype == torch.int64
        assert rows(load(torch.ones(3, 4, dtype=torch.bool), [MASK])).tolist() == [[1] * 4] * 3
        assert rows(load(numbered(4), [InputSpec("x", (None, 2), torch.float16)])).dtype == torch.float16


@pytest.mark.parametrize(("array", "spec", "message"), [
    (torch.zeros(4, 3), VECTOR, r"expects shape \(N, 2\), found \(4, 3\)"),
    (torch.zeros(2), VECTOR, r"found \(2,\); the first dimension must be the batch"),
    (torch.zeros(2, 8, 8, 3), IMAGE, "channels must come before"),
    (torch.zeros(4, 2, dtype=torch.int64), VECTOR, "expects dtype float32, found int64"),
    (torch.zeros(4, 2, dtype=torch.bool), VECTOR, "found bool"),
    (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), IMAGE, "images that are not preprocessed"),
    (torch.zeros(4, 4), IDS, "expects dtype int64, found float32"),
    (torch.full((4, 4), 2**40), InputSpec("i", (None, 4), torch.int32), "do not fit int32"),
    (np.array([["a", "b"]]), VECTOR, "dtype <U1 cannot be used"),
    (torch.zeros(0, 2), VECTOR, "no samples"),
    (torch.eye(2).to_sparse(), VECTOR, "dense"),
    ((torch.zeros(4, 2), torch.zeros(4)), VECTOR, "2 tensors for 1 inputs.*labels"),
])
def test_wrong_arrays_are_named(array, spec, message):
    with pytest.raises(CalibrationError, match=message):
        load(array, [spec])


def test_numbers_of_samples_must_agree():
    with pytest.raises(CalibrationError, match="input_ids 3, attention_mask 2"):
        load((torch.ones(3, 4).long(), torch.ones(2, 4).long()), [IDS, MASK])


def test_values_that_are_not_finite_are_located():
    data = numbered(20)
    data[7, 1], data[11, 0], data[11, 1] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(CalibrationError, match="input x has 3 values that are NaN or infinite, in samples 7, 11"):
        load(data, batch_size=4)
    with pytest.raises(CalibrationError, match=r"1 values .* in sample 2"):  # too large for float32
        load(np.array([[0, 0], [1, 1], [1e300, 2]]))


def test_bad_files(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    (tmp_path / "noise.npz").write_bytes(b"noise")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "noise.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(CalibrationError, match=r"unknown suffix '.csv'"):
        load(tmp_path / "data.csv")
    for name in ("noise.npz", "noise.pt", "noise.safetensors", "noise.npy", "objects.npy"):
        with pytest.raises(CalibrationError, match=rf"{name} cannot be read"):
            load(tmp_path / name)
    with pytest.raises(CalibrationError, match="0 tensors for 1 inputs"):
        load(tmp_path / "empty.npz")
    for missing in ("nowhere/at/all.npy", "nowhere", "bad-module:thing", ""):
        with pytest.raises(CalibrationError, match=r"does not exist|is empty"):
            load(missing)


def test_pickled_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", x=np.array([Evil()], dtype=object))
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object))
    for name in ("evil.pt", "evil.npz", "evil.npy"):
        with pytest.raises(CalibrationError, match="pickled objects are refused"):
            load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ---- user code -------------------------------------------------------------------------------------------------------

USER_CODE = """
import torch
def numbered(n): return torch.stack([torch.arange(n).float(), torch.arange(n) + 0.5], 1)
def tensor(): return numbered(10)
def mapping(): return {"x": numbered(10)}
def one_tuple(): return (numbered(10),)
def batches(): return [numbered(6), numbered(4) + 6]
def generated():
    yield numbered(6)
    yield {"x": numbered(4) + 6}
def endless():
    while True: yield (numbered(5),)
def labelled():
    yield numbered(6), torch.zeros(6)
def late():
    yield numbered(6)
    raise ZeroDivisionError("too late")
def ragged():
    yield torch.zeros(2, 4, dtype=torch.int64)
    yield torch.zeros(2, 5, dtype=torch.int64)
def raises(): raise KeyError("lost")
def nothing(): return None
def no_batches(): return iter(())
def uses_sibling():
    import calibration_sibling_of_test
    return calibration_sibling_of_test.data()
class Source:
    @staticmethod
    def make(): return numbered(10)
number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> Iterator[str]:
    import sys

    (tmp_path / "user_code_of_test.py").write_text(USER_CODE)
    (tmp_path / "calibration_sibling_of_test.py").write_text("from user_code_of_test import tensor as data")
    (tmp_path / "broken_code_of_test.py").write_text("import no_such_dependency_of_test")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "user_code_of_test"
    assert sys.path == before
    for name in ("user_code_of_test", "calibration_sibling_of_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", ["tensor", "mapping", "one_tuple", "batches", "generated", "uses_sibling", "Source.make"]
)
def test_callables_in_every_form(user_module, name):
    found = load(f"{user_module}:{name}", batch_size=4)
    assert sizes(found) == [4, 4, 2] and name in found.origin
    assert sorted(rows(found)[:, 0].tolist()) == list(range(10))


def test_endless_iterators_are_read_no_further_than_needed(user_module):
    assert load(f"{user_module}:endless", samples=12).samples == 12


@pytest.mark.parametrize(("name", "message"), [
    ("raises", "raised KeyError: 'lost'"),
    ("late", "raised ZeroDivisionError: too late"),
    ("nothing", "gave NoneType"),
    ("no_batches", "gave no batches"),
    ("labelled", "2 tensors for 1 inputs"),
    ("missing", "has no missing"),
    ("number", "number is a int, not callable"),
    ("numbered", "raised TypeError"),
])
def test_faults_of_callables_are_named(user_module, name, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        load(f"{user_module}:{name}")
    assert name in str(caught.value)
    if "raised" in message:
        assert caught.value.__cause__ is not None


def test_modules_that_cannot_be_imported(user_module):
    with pytest.raises(CalibrationError, match="no module no_such_module_of_test"):
        load("no_such_module_of_test.sub:data")
    with pytest.raises(CalibrationError, match="importing broken_code_of_test raised ModuleNotFoundError"):
        load("broken_code_of_test:data")
    with pytest.raises(CalibrationError, match=r"differ in shape, \(N, 4\) and \(N, 5\)"):
        load(f"{user_module}:ragged", [InputSpec("ids", (None, None), torch.int64)])


def test_python_objects():
    assert load(lambda: numbered(5)).samples == 5
    assert load([numbered(5), numbered(3)], batch_size=8).samples == 8
    assert load((numbered(5), numbered(3)), batch_size=8).samples == 8
    assert load(iter([numbered(5), numbered(3)]), samples=5).samples == 5
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(numbered(9)), batch_size=2)
    assert sorted(rows(load(loader))[:, 0].tolist()) == list(range(9))
    ids, mask = torch.zeros(3, 4).long(), torch.ones(3, 4).long()
    for pair in ((ids, mask), [ids, mask], [(ids, mask)], {"attention_mask": mask, "input_ids": ids}):
        found = load(pair, [IDS, MASK])
        assert torch.equal(rows(found), ids) and torch.equal(rows(found, 1), mask)
    with pytest.raises(CalibrationError, match="type int"):
        load(3)


# ---- no data ---------------------------------------------------------------------------------------------------------


def test_example_inputs_come_before_made_up_ones():
    found = load(None, example_inputs=[numbered(3)], batch_size=2)
    assert found.origin == "example inputs stored in the model file" and not found.synthetic
    assert torch.equal(rows(found), numbered(3))
    with pytest.raises(CalibrationError, match="example inputs"):
        load(None, example_inputs=[torch.zeros(3, 5)])


def test_made_up_inputs_warn_and_are_seeded():
    inputs = [InputSpec("x", (None, 200), torch.float32), IDS, MASK, InputSpec("flag", (None, None), torch.bool)]
    with pytest.warns(UserWarning, match="accuracy will suffer"):
        found = load(None, inputs, samples=50, batch_size=20)
    assert found.synthetic and sizes(found) == [20, 20, 10]
    noise, ids, mask, flag = (rows(found, i) for i in range(4))
    assert noise.shape == (50, 200) and abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert ids.dtype == torch.int64 and len(ids.unique()) > 4 and int(ids.min()) >= 0
    assert bool((mask == 1).all()) and flag.dtype == torch.bool and bool(flag.all())
    with pytest.warns(UserWarning):
        again = load(None, inputs, samples=50, batch_size=20)
        other = load(None, inputs, samples=50, batch_size=20, seed=1)
    assert torch.equal(noise, rows(again)) and not torch.equal(noise, rows(other))


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_go_through_the_models_preprocessing(tmp_path):
    paths = write_images(tmp_path / "a", 7) + write_images(tmp_path / "b" / "c", 4, suffix=".JPG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._000.png").write_bytes(b"no image")
    found = load(tmp_path, [IMAGE], CONFIG, batch_size=4)
    assert sizes(found) == [4, 4, 3] and "own preprocessing" in found.origin and rows(found).dtype == torch.float32
    transform = create_transform(
        (3, 8, 8),
        is_training=False,
        interpolation="bilinear",
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        crop_pct=0.8,
        crop_mode="center",
    )
    wanted = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    pairs = (rows(found).flatten(1)[:, None] == wanted.flatten(1)[None]).all(-1)
    assert pairs.any(0).all() and pairs.any(1).all()


def test_images_are_chosen_by_the_seed(tmp_path):
    write_images(tmp_path, 9)
    first, again, other = (rows(load(tmp_path, [IMAGE], samples=5, seed=seed)) for seed in (0, 0, 1))
    assert len(first) == 5 and torch.equal(first, again) and not torch.equal(first, other)


def test_images_without_preprocessing_say_so(tmp_path):
    write_images(tmp_path, 1)
    found = load(tmp_path, [IMAGE])
    assert "ImageNet mean and std" in found.origin and "8x8" in found.origin
    expected = (torch.tensor([0, 10, 5]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(rows(found), expected.reshape(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-5)


def test_the_size_comes_from_the_input_then_from_the_preprocessing(tmp_path):
    write_images(tmp_path, 2)
    free = InputSpec("x", (None, 3, None, None), torch.float16)
    assert rows(load(tmp_path, [InputSpec("x", (None, 3, 6, 9), torch.float32)], CONFIG)).shape == (2, 3, 6, 9)
    assert rows(load(tmp_path, [free], CONFIG)).shape == (2, 3, 8, 8)
    found = rows(load(tmp_path, [free]))
    assert found.shape == (2, 3, 224, 224) and found.dtype == torch.float16


def test_a_fixed_batch_repeats_or_drops_images(tmp_path):
    write_images(tmp_path, 5)
    assert sizes(load(tmp_path, [InputSpec("x", (2, 3, 8, 8), torch.float32)])) == [2, 2]
    assert sizes(load(tmp_path, [InputSpec("x", (8, 3, 8, 8), torch.float32)])) == [8]
    assert sizes(load(tmp_path, [InputSpec("x", (1, 3, 8, 8), torch.float32)])) == [1] * 5


def test_modes_other_than_rgb(tmp_path):
    ramp = np.full((8, 8), 128 * 257, dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8), (128, 128, 128, 0)).save(tmp_path / "alpha.png")
    Image.new("P", (8, 8), 0).convert("P").save(tmp_path / "palette.png")
    plain = {"mean": 0.0, "std": 1.0, "crop_pct": 1.0}
    found = rows(load(tmp_path, [IMAGE], plain))
    means = sorted(round(float(v) * 255) for v in found.mean((1, 2, 3)))
    assert means == [0, 128, 128, 128]
    grey = rows(load(tmp_path, [InputSpec("x", (None, 1, 8, 8), torch.float32)], CONFIG))
    assert grey.shape == (4, 1, 8, 8)
    assert np.isclose(float(grey.max()), (128 / 255 - 0.4) / 0.3, atol=1e-4)


def test_unreadable_images_are_named_up_to_five(tmp_path):
    write_images(tmp_path, 3)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-400])
    with pytest.raises(CalibrationError, match=r"1 image is unreadable or truncated: .*cut\.jpg"):
        load(tmp_path, [IMAGE])
    for i in range(7):
        (tmp_path / f"noise{i}.png").write_bytes(b"noise")
    with pytest.raises(CalibrationError, match=r"8 images are unreadable.*and 3 more") as caught:
        load(tmp_path, [IMAGE])
    assert str(caught.value).count(".png (") + str(caught.value).count(".jpg (") == 5


def test_folders_and_inputs_that_do_not_fit(tmp_path):
    with pytest.raises(CalibrationError, match="it is empty"):
        load(tmp_path, [IMAGE])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(CalibrationError, match="no images in the folder"):
        load(tmp_path, [IMAGE])
    write_images(tmp_path, 2)
    for inputs, message in (
        ([IDS, MASK], "one float input"),
        ([IDS], "one float input"),
        ([VECTOR], "not an image batch"),
        ([InputSpec("x", (None, 5, 8, 8), torch.float32)], "5 channels"),
    ):
        with pytest.raises(CalibrationError, match=message):
            load(tmp_path, inputs)
    for wrong in ({"std": (0, 1, 1)}, {"mean": (1, 2)}, {"mean": "abc"}, {"interpolation": "guess"}):
        with pytest.raises(CalibrationError, match="preprocessing"):
            load(tmp_path, [IMAGE], wrong)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, 1)
    monkeypatch.setitem(__import__("sys").modules, "timm.data", None)
    with pytest.raises(CalibrationError, match=r"repquant-fx\[vision\]"):
        load(tmp_path, [IMAGE])


def test_links_that_go_round_in_circles(tmp_path):
    write_images(tmp_path / "a", 2)
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_images(tmp_path)) == 2


@given(st.integers(0, 50), st.integers(1, 12))
def test_reading_ahead_keeps_the_order(count, ahead):
    assert list(read_ahead(lambda i: i * i, range(count), ahead)) == [i * i for i in range(count)]


def test_reading_ahead_is_bounded():
    started: list[int] = []
    stream = read_ahead(started.append, range(1000), ahead=8)
    next(stream)
    stream.close()
    assert len(started) <= 8
    assert image_module.NAMED_FILES == 5
