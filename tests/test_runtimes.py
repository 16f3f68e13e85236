"""Files in the runtimes of their targets: against the FX reference when they are made, against themselves later."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import compiled, inputs
from onnx import numpy_helper

from repquant_fx import file_check, named_runtime, report, runtimes
from repquant_fx.errors import InputError, ModelFileError, ParityError
from repquant_fx.exporters.inlining import inlined
from repquant_fx.file_check import check_file
from repquant_fx.named_runtime import RuntimeCheck, check_in_runtime
from repquant_fx.runtimes import import_openvino, load_openvino, openvino_precision, version
from repquant_fx.targets import RUNTIMES

OTHERS = ("openvino", "reference")
CASES = [("vit", 8), ("vit", 4), *(pytest.param(name, bits, marks=pytest.mark.slow)
                                   for name, bits in (("vit", 6), ("swin", 8), ("swin", 6), ("swin", 4)))]


def need(runtime: str) -> None:
    if version(runtime) is None:
        pytest.skip(f"{runtime} is not installed")


def standard(name: str, bits: int, **changes: Any) -> onnx.ModelProto:
    """A shared model as a target of standard operators has it."""
    return inlined(compiled(name, bits, **changes).proto)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def wrong(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With one scale that is not what it should be."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == "blocks.0.mlp.fc1.input_scale")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    return copy


@pytest.mark.parametrize("runtime", OTHERS)
@pytest.mark.parametrize("name, bits", CASES)
def test_every_runtime_computes_the_codes_of_the_reference(name: str, bits: int, runtime: str) -> None:
    need(runtime)
    model = compiled(name, bits)
    found = check_in_runtime(runtime, model.graph_module, standard(name, bits), model.quantizers,
                             [inputs(name, 8, seed=9)], ["x"])
    assert found is not None and found.version == version(runtime) and found.parity is not None
    assert found.parity.problems() == [] and found.parity.runtime == RUNTIMES[runtime]
    assert found.parity.output_step < 1e-5 and found.parity.samples == (8 if runtime == "openvino" else 2)
    assert (found.output_sqnr is None) == (found.precision == "")


def test_openvino_keeps_float32_when_told() -> None:
    need("openvino")
    proto, x = standard("vit", 8), inputs("vit", 4, seed=9)
    told, unasked = (load_openvino(proto, settings)({"x": x})[0] for settings in (None, {}))
    expected = torch.from_numpy(compiled("vit", 8).session(1).run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
    kept = openvino_precision(proto) in ("f32", "float32")
    assert kept == torch.allclose(unasked, expected, rtol=1e-4, atol=1e-4)


def test_openvino_tells_nobody_that_it_was_imported() -> None:
    need("openvino")
    import_openvino()
    assert "openvino_telemetry" not in sys.modules and import_openvino() is sys.modules["openvino"]


def test_what_was_not_checked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("vit", 8)
    arguments = (model.graph_module, model.proto, model.quantizers, [inputs("vit", 2)], ["x"])
    assert check_in_runtime("ort", *arguments) is None
    monkeypatch.setattr(named_runtime, "REFERENCE_BYTES", 1000)
    large = check_in_runtime("reference", *arguments)
    monkeypatch.setattr(named_runtime, "version", lambda runtime: None)
    absent = check_in_runtime("openvino", *arguments)
    assert large is not None and absent is not None and absent.parity is large.parity is None
    for found, words in ((large, "not checked in onnx.reference, the runtime of the target: the file is larger than"),
                         (absent, "not installed (pip install openvino); ONNX Runtime was")):
        assert words in report.summary({**model.report, "runtime": found.to_dict()})
    monkeypatch.setattr(runtimes, "version", lambda runtime: None)
    with pytest.raises(InputError, match="OpenVINO is not installed: pip install openvino"):
        runtimes.loader("openvino")


def test_a_precision_that_nobody_asked_for_is_told() -> None:
    model = compiled("vit", 8)
    assert model.parity is not None
    found = RuntimeCheck("OpenVINO", "2026.4.1", replace(model.parity, runtime="OpenVINO"), "", "bfloat16", 12.5)
    lines = report.summary({**model.report, "runtime": found.to_dict()})
    assert "checked in OpenVINO at each of" in lines
    assert "in bfloat16 on this processor: output 12.5 dB, which is worse than what quantization costs" in lines


# ---- files made before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_against_itself(runtime: str, tmp_path: Path) -> None:
    need(runtime)
    model = compiled("vit", 4)
    found = check_file(saved(model.proto if runtime == "ort" else standard("vit", 4), tmp_path), runtime)
    assert found.parity.problems() == [] and found.parity.output_sqnr > 30 and found.target == "ort-cpu"
    assert len(found.parity.quantizers) > 10 and "dead leaves" in found.inputs
    assert "blocks.0.attn.probabilities_dequantized" in found.parity.quantizers


def test_four_bit_types_against_themselves(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs("vit", 5, seed=9).numpy())
    path = saved(compiled("vit", 3, container="int4").proto, tmp_path)
    found = check_file(path, data=str(tmp_path / "x.npz"), samples=3)
    assert found.parity.problems() == [] and found.parity.samples == 3
    with pytest.raises(InputError, match="works on UINT4, which the target openvino does not take"):
        check_file(saved(inlined(compiled("vit", 3, container="int4").proto), tmp_path), "openvino")


def test_openvino_takes_a_file_and_its_data_where_one_file_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    need("openvino")
    result, x = compiled("vit", 8), {"x": inputs("vit", 2)}
    model = replace(result.model, proto=inlined(result.model.proto))
    (inside,) = load_openvino(model)(x)
    monkeypatch.setattr(runtimes, "LARGEST_FILE", model.size() - 1)
    assert model.files and torch.equal(load_openvino(model)(x)[0], inside)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_runtime_that_computes_something_else_is_found(bits: int, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    right = runtimes.load_ort
    monkeypatch.setattr(file_check, "loader", lambda runtime: lambda model: right(wrong(model.inlined())))
    found = check_file(saved(compiled("vit", bits, activation_affine=False).proto, tmp_path))
    problems = found.parity.problems()
    assert [problem.partition(": ")[0] for problem in problems] == [
        "blocks.0.mlp.fc1.input_quantized", "blocks.0.mlp.fc2.input_quantized"]  # where it quantizes, and what reads it
    with pytest.raises(ParityError, match="ONNX Runtime and the file run operator by operator disagree"):
        found.parity.raise_on_problems()


def test_a_runtime_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(file_check, "loader", lambda runtime: lambda proto: broken)
    with pytest.raises(InputError, match=r"m\.onnx fails under ONNX Runtime: no kernel"):
        check_file(saved(compiled("vit", 8).proto, tmp_path))


def test_a_file_that_says_too_little_is_refused(tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(standard("vit", 8))
    del proto.opset_import[:]
    with pytest.raises(InputError, match="does not say of which opset"):
        check_file(saved(proto, tmp_path), "ort")
    proto.CopyFrom(standard("vit", 8))
    gelu = next(node for node in proto.graph.node if node.op_type == "Gelu")
    gelu.input[0] = "nowhere"
    with pytest.raises(InputError):
        check_file(saved(proto, tmp_path), "ort")


def test_functions_are_not_for_openvino(tmp_path: Path) -> None:
    need("openvino")
    with pytest.raises(InputError, match=r"'blocks\.0\.attn/Log2Softmax' .*compile with --target openvino"):
        check_file(saved(compiled("vit", 8).proto, tmp_path), "openvino")
    with pytest.raises(ModelFileError, match=r"OpenVINO cannot load the model: .*Log2Softmax"):
        load_openvino(compiled("vit", 8).proto)
