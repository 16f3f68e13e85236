"""The runtimes that a file can be checked in, behind one interface.

Each computes what the file says as nearly as it can. ONNX Runtime does by default (see `runtime.session`), and
`onnx.reference` has nothing to set. OpenVINO takes the precision of its float operators from the processor: bfloat16
where that has instructions for it, which moves codes and outputs by more than rounding does. Here it is told to keep
float32; what it does unasked is measured beside it.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import Tensor

from repquant_fx.errors import InputError, ModelFileError, first_line
from repquant_fx.exporters.apart import LARGEST_FILE, OnnxModel
from repquant_fx.files import MODEL, Content, scratch, write_part
from repquant_fx.runtime import run, session
from repquant_fx.targets import RUNTIMES

Call = Callable[[Mapping[str, Tensor]], list[Tensor]]
Model: TypeAlias = onnx.ModelProto | OnnxModel
Loader = Callable[[Model], Call]
PACKAGES = {"ort": "onnxruntime", "openvino": "openvino", "reference": "onnx"}
_WHERE = ("Exception from", "Check '", "FrontEnd API", "Summary:", "To facilitate")
OPENVINO_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def version(runtime: str) -> str | None:
    """Of an installed runtime; None where it is not installed."""
    try:
        return metadata.version(PACKAGES[runtime]).partition("-")[0]
    except metadata.PackageNotFoundError:
        return None


def loader(runtime: str) -> Loader:
    """What makes a function of named inputs to all outputs, in order, out of a model.

    Raises:
        InputError: the runtime is not installed.
    """
    if version(runtime) is None:
        package = PACKAGES[runtime]
        raise InputError(f"{RUNTIMES[runtime]} is not installed: pip install {package}")
    if runtime == "openvino":
        import_openvino()
    return {"ort": load_ort, "openvino": load_openvino, "reference": load_reference}[runtime]


def import_openvino() -> Any:
    """The package, without its telemetry: on import it would start a process that tells its makers of it."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    telemetry = "openvino_telemetry"
    before = sys.modules.get(telemetry)
    sys.modules[telemetry] = None  # type: ignore[assignment]  # not to be found; then it takes a stub of its own
    try:
        return importlib.import_module("openvino")
    finally:
        if before is None:
            del sys.modules[telemetry]
        else:
            sys.modules[telemetry] = before


def load_ort(model: Model) -> Call:
    """ONNX Runtime on the CPU."""
    found = session(model)
    return lambda feed: run(found, feed)


def load_openvino(model: Model, settings: Mapping[str, Any] | None = None) -> Call:
    """OpenVINO on the CPU; its float operators compute in float32 unless other settings are given.

    Raises:
        ModelFileError: OpenVINO refuses the model.
    """
    compiled = compile_openvino(model, OPENVINO_FLOAT32 if settings is None else settings)

    def call(feed: Mapping[str, Tensor]) -> list[Tensor]:
        results = compiled({name: _array(value) for name, value in feed.items()})
        return [torch.from_numpy(np.array(results[output])) for output in compiled.outputs]

    return call


def compile_openvino(model: Model, settings: Mapping[str, Any]) -> Any:
    """A compiled model of OpenVINO.

    Raises:
        ModelFileError: OpenVINO refuses the model.
    """
    core, model = import_openvino().Core(), OnnxModel.of(model)
    try:
        if model.size() <= LARGEST_FILE:
            return core.compile_model(core.read_model(io.BytesIO(model.to_bytes())), "CPU", dict(settings))
        with scratch() as folder:
            data, beside = model.beside(MODEL)
            files: dict[str, Content] = {**beside, MODEL: data}
            for name, content in files.items():
                write_part(folder / name, content)
            return core.compile_model(core.read_model(folder / MODEL), "CPU", dict(settings))
    except Exception as error:
        raise ModelFileError(f"OpenVINO cannot load the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an exception of OpenVINO says beside where in its sources it was raised."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_WHERE)]
    return "; ".join(said)[:300] or type(error).__name__


def openvino_precision(model: Model) -> str:
    """What the float operators compute in unasked, such as `bf16`."""
    found = compile_openvino(model, {}).get_property("INFERENCE_PRECISION_HINT")
    return str(found.get_type_name())


def load_reference(model: Model) -> Call:
    """ONNX's own evaluator in numpy: slow, and what the standard means.

    Raises:
        ModelFileError: it does not know an operator.
    """
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(OnnxModel.of(model).inlined())
    except Exception as error:
        raise ModelFileError(f"onnx.reference cannot load the model: {first_line(error)}") from error

    def call(feed: Mapping[str, Tensor]) -> list[Tensor]:
        with np.errstate(all="ignore"):  # the logarithm of a probability of zero
            found = evaluator.run(None, {name: _array(value) for name, value in feed.items()})
        return [torch.from_numpy(np.array(value)) for value in found]

    return call


def load_as_written(model: Model) -> Call:
    """ONNX Runtime without its optimizations: each operator as it stands, Q/DQ in float; what others are compared with.

    Raises:
        ModelFileError: ONNX Runtime refuses the model.
    """
    found = session(model, optimize=False)
    return lambda feed: run(found, feed)


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy())
