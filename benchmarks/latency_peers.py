"""What `latency.py` measures beside our files: other tools, each as its makers advise.

- `optimized float`: the float graph after `onnxruntime.transformers.optimizer` (fused norms and GELU, and attention
  where it knows the pattern);
- `dynamic`: `quantize_dynamic`, int8 weights per channel, after `quant_pre_process`;
- `peer` and `peer, products`: `quantize_static`, see `latency.py`;
- `NNCF`: `nncf.quantize` with `ModelType.TRANSFORMER` (SmoothQuant and bias correction) of the float graph in
  OpenVINO. NNCF is installed where someone wants it: `pip install nncf`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from repquant_fx.runtimes import import_openvino


def quantize_static(source: Path, target: Path, calibration: dict[str, Tensor], operators: list[str] | None) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as peer

    count = len(next(iter(calibration.values())))
    batches = iter([{k: v[i:i + 4].numpy() for k, v in calibration.items()} for i in range(0, count, 4)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as scratch:
        peer(
            prepared(source, scratch),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=operators,
        )


def prepared(source: Path, folder: str) -> str:
    """The float file after ONNX Runtime's own preparation."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = str(Path(folder) / "prepared.onnx")
    quant_pre_process(str(source), path, skip_symbolic_shape=True)
    return path


def quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as peer

    with tempfile.TemporaryDirectory() as scratch:
        peer(prepared(source, scratch), str(target), weight_type=QuantType.QInt8, per_channel=True)


def optimize(source: Path, target: Path, text: bool) -> None:
    """`num_heads` of 0 lets the optimizer find heads and hidden size in the graph."""
    from onnxruntime.transformers import optimizer

    found = optimizer.optimize_model(str(source), "bert" if text else "vit", num_heads=0, hidden_size=0, opt_level=0)
    found.save_model_to_file(str(target))


def quantize_nncf(source: Path, target: Path, calibration: dict[str, Tensor], smooth: bool = True) -> None:
    """Writes OpenVINO's own format, `target` and its weights beside it; without SmoothQuant on request.

    Raises:
        ImportError: NNCF is not installed.
    """
    openvino = import_openvino()
    import nncf

    count = len(next(iter(calibration.values())))
    samples = [{k: v[i:i + 1].numpy() for k, v in calibration.items()} for i in range(count)]
    model = openvino.Core().read_model(source)
    advanced = nncf.AdvancedQuantizationParameters()
    if not smooth:
        advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    model = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=count,
                          advanced_parameters=advanced)
    openvino.save_model(model, target, compress_to_fp16=False)
