"""The compiler's check in the runtime that its target names, beside the one in ONNX Runtime.

OpenVINO is judged as ONNX Runtime is, code for code at every quantizer, with its float operators in float32: measured
on the tests' models at W8A8, W6A6 and W4A4, no code differs on equal inputs but where a value lies midway between two.
Where it would run them in another precision unasked, the output of that run is measured too and reported, not judged:
that is a choice of the processor and not of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.audit import Product, audit
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.parity import Parity, compare, sqnr
from repquant_fx.runtimes import PACKAGES, load_openvino, openvino_precision, version
from repquant_fx.targets import RUNTIMES

REFERENCE_BYTES = 32 << 20  # of a file: onnx.reference computes in numpy, operator by operator
REFERENCE_SAMPLES = 2


@dataclass(frozen=True)
class RuntimeCheck:
    """What the runtime of a target computed.

    Attributes:
        runtime: its name, for people.
        version: None where it is not installed.
        parity: the comparison with the FX reference; None where it was not made.
        skipped: why not.
        precision: in which its float operators compute unasked, where that is not float32.
        kernels: what it makes of each quantized product; None where that is not known.
        output_sqnr: of its output in that precision against the FX reference, dB.
    """

    runtime: str
    version: str | None
    parity: Parity | None = None
    skipped: str = ""
    precision: str = ""
    output_sqnr: float | None = None
    kernels: list[Product] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        kernels = None if self.kernels is None else [asdict(product) for product in self.kernels]
        return {**vars(self), "parity": None if self.parity is None else self.parity.to_dict(), "kernels": kernels}


def check_in_runtime(
    runtime: str, graph_module: GraphModule, model: onnx.ModelProto | OnnxModel, quantizers: Mapping[str, Node],
    inputs: Sequence[Tensor], input_names: Sequence[str], dynamic_batch: bool = True,
) -> RuntimeCheck | None:
    """Compare as `parity.compare` does; None for ONNX Runtime, which every file is compared in.

    Raises:
        InputError: the runtime refuses the file.
    """
    if runtime == "ort":
        return None
    title, found = RUNTIMES[runtime], version(runtime)
    if found is None:
        return RuntimeCheck(title, None, skipped=f"it is not installed (pip install {PACKAGES[runtime]})")
    if runtime == "reference":
        if OnnxModel.of(model).size() > REFERENCE_BYTES:
            return RuntimeCheck(title, found, skipped=f"the file is larger than {REFERENCE_BYTES >> 20} MiB")
        inputs = [tensor[:REFERENCE_SAMPLES] for tensor in inputs] if dynamic_batch else inputs
    parity = compare(graph_module, model, quantizers, inputs, input_names, runtime)
    if runtime != "openvino":
        return RuntimeCheck(title, found, parity)
    kernels, precision = audit(model, runtime), openvino_precision(model)
    if precision in ("float32", "f32"):
        return RuntimeCheck(title, found, parity, kernels=kernels)
    with torch.no_grad():
        expected = tensors_in(graph_module(*inputs))
    unasked = load_openvino(model, {})(dict(zip(input_names, inputs)))
    return RuntimeCheck(title, found, parity, precision=precision, kernels=kernels,
                        output_sqnr=min((sqnr(a, b) for a, b in zip(unasked, expected)), default=math.inf))
