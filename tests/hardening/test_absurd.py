"""Absurd sizes, bombs and files without end: refused with one clear message, before memory is taken.

Long because it is a list of bombs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import (
    archive_of,
    arrays,
    as_key,
    bomb,
    deep,
    doubling,
    npy,
    records_of,
    safetensors_header,
    torch_file,
    torch_zip,
    zipped,
)
from test_fuzz import ARCH, whole

from repquant_fx import limits
from repquant_fx.calibration.arrays import read_arrays
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.images import ImageReader, Unreadable
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.errors import CalibrationError, InputError, ModelFileError, RecipeError
from repquant_fx.files import irregular
from repquant_fx.frontends import architectures
from repquant_fx.frontends.huggingface import load_directory
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.pt2_expressions import is_safe_expression
from repquant_fx.recipe import Recipe


def peak() -> int:
    """Bytes of the largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(autouse=True)
def _cheap() -> Any:
    """Each refusal takes little more than was taken before: what is refused here asks for thousands."""
    before = peak()
    yield
    assert peak() - before < 1.5e9


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "embed_dim=1200000",
        "img_size=10000000",
        "num_classes=1000000000000",
        "in_chans=100000000",
        "mlp_ratio=1e9",
        "depth=1000000",
    ],
)
def test_architectures_beyond_the_memory(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_MODULES", 1000)  # as it is, it takes seconds to count so far
    with pytest.raises(InputError, match="is too large"):
        load_model(f"timm:vit_tiny_patch16_224,{options}")


def test_the_architecture_that_a_file_names(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "m.safetensors"
    path.write_bytes(
        safetensors.torch.save({"a": torch.ones(1)}, {"arch": "timm:vit_tiny_patch16_224,embed_dim=1200000"})
    )
    with pytest.raises(InputError, match="is too large"):
        load_model(path)


def test_counting_leaves_other_modules_alone() -> None:
    with pytest.raises(InputError, match="is too large"), limits.bounded_modules("x"), torch.device("meta"):
        torch.nn.Linear(10**7, 10**7)
    torch.nn.Linear(4, 4)
    with limits.bounded_modules("x"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model[0].weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert torch.equal(model[0].weight, torch.zeros(4, 4))


@pytest.mark.parametrize("shape", [(3, 10**6, 10**6), (3, 10**20, 3)])
def test_input_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="this machine has"):
        load_model(ARCH, input_shape=shape)


@pytest.mark.parametrize(
    "layer", [torch.nn.Upsample(scale_factor=1e5), torch.nn.ConstantPad2d(1 << 20, 0.0)], ids=["resized", "padded"]
)
def test_results_beyond_the_memory(layer: torch.nn.Module) -> None:
    """What a pickled layer of torch may ask for is known before anything runs."""
    from repquant_fx.frontends.capture import capture

    with pytest.raises(InputError, match=r"the model: a result of aten\.\S+ of shape .* this machine has"):
        capture(torch.nn.Sequential(layer), (torch.ones(2, 3, 8, 8),))


def bert(folder: Path, **changes: Any) -> Path:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=40,
        max_position_embeddings=32,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9},
        {"vocab_size": 10**13},
        {"intermediate_size": 10**12},
        {"max_position_embeddings": 10**12},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids=str,
)
def test_configurations(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is too large|asks for num_"):
        load_directory(bert(tmp_path, **changes))


@pytest.mark.parametrize("size", [{"height": 10**9, "width": 10**9}, {"height": -5, "width": -5}, "abc"], ids=str)
def test_sizes_of_an_image_processor(size: Any, tmp_path: Path) -> None:
    import transformers

    transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
        )
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load_model(tmp_path)  # the model knows its own size; a processor that cannot be used is left out
        except InputError as error:
            assert "this machine has" in str(error)
        else:
            assert any("image processor" in str(warning.message) for warning in caught)


# ---- archives and pickles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pickled, message",
    [
        (as_key(doubling()), "nests tuples"),
        (as_key(deep()), "nests tuples"),
        (b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".", "damaged"),
        (b"\x80\x02" + b"]" * (17 << 20) + b".", "16 MiB"),
    ],
    ids=["doubling", "deep", "bytearray", "long"],
)
def test_pickles_that_do_not_end(pickled: bytes, message: str, tmp_path: Path) -> None:
    for name, read in (("m.pt", load_model), ("a.pt", read_arrays)):
        (tmp_path / name).write_bytes(torch_zip(pickled))
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)


def test_pickles_that_name_classes_without_end(tmp_path: Path) -> None:
    names = b"".join(b"ca\nb%d\n0" % number for number in range(20_000))
    (tmp_path / "m.pt").write_bytes(torch_zip(b"\x80\x02" + names + b"N."))
    with pytest.raises(ModelFileError, match="not known to be harmless"):
        load_model(tmp_path / "m.pt")


LISTS = b"]q\x00" + b"".join(
    b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1]) for level in range(60)
)


@pytest.mark.parametrize(
    "pickled", [doubling(), LISTS, b"]q\0h\0a", as_key(deep())[2:-1]], ids=["tuples", "lists", "itself", "deep"]
)
def test_inputs_of_a_program_that_do_not_end(pickled: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(
        archive_of({**records_of(whole("pt2")), "data/sample_inputs/model.pt": torch_zip(b"\x80\x02" + pickled + b".")})
    )
    with pytest.raises(ModelFileError, match="refused before loading"):
        load_model(tmp_path / "m.pt2")


def lying(size: tuple[int, ...], stride: tuple[int, ...], numel: int) -> bytes:
    """A state dict of one tensor with 16 bytes behind it, which claims more."""
    import io
    import pickle

    class Lie:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (
                Storage(),
                0,
                size,
                stride,
                False,
                __import__("collections").OrderedDict(),
            )

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Lie()})
    return torch_zip(buffer.getvalue(), {"data/0": bytes(16)})


@pytest.mark.parametrize(
    "size, stride, numel", [((10**12,), (1,), 4), ((10**12,), (1,), 10**12), ((10**13,), (0,), 4), ((4,), (-1,), 4)]
)
def test_tensors_that_claim_more_than_the_file_has(size: Any, stride: Any, numel: int, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(lying(size, stride, numel))
    with pytest.raises(InputError):
        load_model(tmp_path / "m.pt", arch=ARCH)
    with pytest.raises(InputError):
        load_calibration(tmp_path / "m.pt", [InputSpec("x", (None,), torch.float32)], preprocessing=None)


@pytest.mark.parametrize("name", ["a.npz", "a.pt"])
def test_zip_bombs_as_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BOMB_BYTES", 1 << 24)
    (tmp_path / name).write_bytes(bomb("x.npy"))
    with pytest.raises(CalibrationError, match="would unpack to"):
        read_arrays(tmp_path / name)


@pytest.mark.parametrize("shape", [(10**13, 3), (2**62, 2**62), (-1, 3), (10**6, 10**6)])
def test_headers_of_arrays(shape: tuple[int, ...], tmp_path: Path) -> None:
    for name, data in (("a.npy", npy(shape)), ("a.npz", zipped({"x.npy": npy(shape)}))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CalibrationError, match="cannot be read as plain arrays"):
            arrays(tmp_path / name)


@pytest.mark.parametrize(
    "data",
    [
        safetensors_header(b"{}", 2**62),
        safetensors_header(b"{}", 99_000_000),
        safetensors_header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        safetensors_header(b"{" * 100_000),
    ],
)
def test_headers_of_safetensors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError):
        load_model(tmp_path / "m.safetensors", arch=ARCH)
    with pytest.raises(CalibrationError):
        read_arrays(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "Mul(" + ",".join(f"Add(s{i},Integer(1))" for i in range(40)) + ")",
        f"Pow(Add({','.join(f's{i}' for i in range(10))}), Integer(64))",
        "Pow(Pow(Pow(Integer(4611686018427387904),Integer(64)),Integer(64)),Integer(64))",
    ],
)
def test_expressions_that_grow_when_expanded(text: str) -> None:
    assert not is_safe_expression(text)


def test_expressions_of_windows_and_grids_pass() -> None:
    assert is_safe_expression("Mul(Pow(Add(FloorDiv(s0, 14), Integer(1)), Integer(2)), Add(s1, Integer(1)))")


def test_samples_without_end() -> None:
    with pytest.raises(InputError, match="this machine has"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_calibration(None, [InputSpec("x", (None, 8), torch.float32)], preprocessing=None, samples=10**12)


# ---- images, recipes, paths ------------------------------------------------------------------------------------------


def test_images_that_are_thin_vast_or_programs(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (1, 60_000)).save(tmp_path / "thin.png")
    (tmp_path / "vast.ppm").write_bytes(b"P6 99999 99999 255\n")
    (tmp_path / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    reader = ImageReader(None, (3, 8, 8))
    reasons = {path.name: reader(path) for path in tmp_path.iterdir()}
    assert all(isinstance(reason, Unreadable) for reason in reasons.values())
    assert (
        "long and thin" in reasons["thin.png"].reason
        and "pipe" in reasons["pipe.png"].reason
        and "bomb" in reasons["vast.ppm"].reason
    )
    assert "cannot identify" in reasons["script.png"].reason


LOL = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGE = "a: &a {k: 1, l: 2}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "suffix, text, message",
    [
        (".yaml", LOL, "aliases"),
        (".yaml", MERGE, "aliases"),
        (".yaml", "wbits: &a [*a]", "aliases"),
        (".yaml", "[" * 50_000, "levels deep"),
        (".yaml", "wbits: " + "1" * 5000, "not valid YAML"),
        (".yaml", "x" * 300_000, "larger than"),
        (".toml", "a=" + "[" * 50_000, "not valid TOML"),
        (".toml", ".".join(["a"] * 20_000) + "=1", "parts"),
        (".yaml", "!!python/object/apply:os.system [touch RAN]", "not valid YAML"),
    ],
    ids=["aliases", "merges", "itself", "depth", "digits", "size", "toml depth", "dots", "tag"],
)
def test_recipes(suffix: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"r{suffix}"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_file(path)
    assert len(str(caught.value)) < 1000 and not (tmp_path / "RAN").exists()


def test_recipes_with_dots_in_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        "wbits = 4\nlayers = [{match = \"a.b.c.d.e.f.g.h.i.j.k\"}, {match = 'l.m.n.o.p.q.r.s.t.u.v'}]\n"
    )
    assert [rule.match[-1] for rule in Recipe.from_file(tmp_path / "r.toml").layers] == ["k", "v"]


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert irregular(tmp_path) is None and irregular(tmp_path / "none") is None and irregular(Path("a\0b")) is None
    for name, target in (("m", "pipe"), ("a.npy", "pipe"), ("a.pt", "/dev/zero"), ("t.txt", "/dev/zero")):
        os.symlink(target, tmp_path / name)
        with pytest.raises(InputError, match=r"a pipe|a device"):
            load_model(tmp_path / name)
        with pytest.raises(CalibrationError, match=r"a pipe|a device"):
            load_calibration(tmp_path / name, [InputSpec("x", (None, 4), torch.float32)], preprocessing=None)
    os.symlink("/dev/zero", tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="larger than"):
        Recipe.from_file(tmp_path / "r.yaml")


@pytest.mark.parametrize("source", ["a" * 5000, "a\0b"])
def test_paths_that_are_none(source: str) -> None:
    with pytest.raises(InputError):
        load_model(source)


def test_with_little_memory(tmp_path: Path) -> None:
    """The command line in a process that may take 2 GiB more: the limit is respected, and what still does not fit is no
    internal error.
    """
    (tmp_path / "m.pt").write_bytes(torch_file({"a": torch.ones(1)}))
    script = textwrap.dedent("""
        import resource, sys, warnings
        from repquant_fx.cli import main
        import repquant_fx.compiler, timm
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30),) * 2)
        def codes(*argv):
            print(main(["compile", *argv, "--out", "m.onnx"]), flush=True)
        codes("timm:vit_tiny_patch16_224,embed_dim=60000,depth=1")
        codes("m.pt", "--arch", "timm:vit_tiny_patch16_224,num_classes=100000000")
        codes("timm:convnext_atto", "--input-shape", "3,10000,10000")
        codes("timm:convnext_atto", "--input-shape", "3,100000,100000")
    """)
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["2"] * 4, done.stdout + done.stderr
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr and "llocate memory" in done.stderr, (
        done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_what_fits_is_built() -> None:
    assert architectures.build(architectures.parse_architecture(ARCH)).num_classes == 2
