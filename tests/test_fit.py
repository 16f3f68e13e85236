"""This processor and a file: what is told of the processor, and when the two do not fit."""

from __future__ import annotations

import platform
from pathlib import Path

import onnx
import pytest
from compiled import compiled

from repquant_fx import processor
from repquant_fx.errors import RepQuantWarning
from repquant_fx.exporters.inlining import inlined
from repquant_fx.file_check import check_file
from repquant_fx.fit import misfit, saturating_layers
from repquant_fx.inspection import inspect_file
from repquant_fx.runtime import session_options

KEY = "session.x64quantprecision"


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "saturates", lambda: True)


@pytest.mark.parametrize("machine, text, saturates", [
    ("x86_64", "model name : old\nflags\t\t: fpu sse4_2 avx2 bmi2\n", True),
    ("AMD64", "flags\t\t: avx2 avx512f avx512bw\n", True),
    ("x86_64", "flags\t\t: avx2 avx512f avx512_vnni\n", False),
    ("x86_64", "flags\t\t: avx2 avx_vnni\n", False),
    ("x86_64", "flags\t\t: sse4_1\n", False),
    ("aarch64", "Features\t: fp asimd asimddp\n", False),
])
def test_what_linux_tells(machine: str, text: str, saturates: bool, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "flags", processor.flags.__wrapped__)
    assert processor.saturates() == saturates


def test_elsewhere_numpy_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    found = processor.flags.__wrapped__()
    assert found and all(name == name.lower() for name in found)
    monkeypatch.setattr(processor.importlib, "import_module", lambda name: object())
    assert processor.flags.__wrapped__() == frozenset()


def test_the_layers_that_may_saturate() -> None:
    for proto in (compiled("vit", 8).proto, inlined(compiled("vit", 8).proto)):
        layers = saturating_layers(proto)
        assert "blocks.0.mlp.fc1/Gemm" in layers and len(layers) == sum(n.op_type == "Gemm" for n in proto.graph.node)
    assert saturating_layers(compiled("vit", 7, 8).proto) == saturating_layers(compiled("vit", 4).proto) == []
    assert saturating_layers(onnx.ModelProto()) == []
    broken = onnx.ModelProto()
    broken.CopyFrom(compiled("vit", 8).proto)
    for node in broken.graph.node:
        del node.input[:]
    assert saturating_layers(broken) == []


def test_who_runs_it_is_warned(without_vnni: None, tmp_path: Path) -> None:
    path = compiled("vit", 8).save(tmp_path / "full.onnx")
    words = r"has no VNNI: 8-bit weights may make sums of .* and 9 more saturate .*--target ort-cpu-avx2"
    with pytest.warns(RepQuantWarning, match=words):
        inspect_file(path, audit=False)
    with pytest.warns(RepQuantWarning, match=words):
        assert check_file(path, "ort").parity.problems() == []
    assert misfit(compiled("vit", 7, 8).proto) == ""


def test_a_session_asks_for_exact_kernels_where_that_helps(without_vnni: None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    assert session_options().get_session_config_entry(KEY) == "1"
    monkeypatch.setattr(processor, "saturates", lambda: False)
    with pytest.raises(RuntimeError):
        session_options().get_session_config_entry(KEY)
    assert misfit(compiled("vit", 8).proto) == ""
