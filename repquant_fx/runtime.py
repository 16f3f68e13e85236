"""ONNX Runtime sessions for exported models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from repquant_fx import processor
from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.reading import read_onnx


def session_options(threads: int | None = None, accuracy_level: int = 1) -> onnxruntime.SessionOptions:
    """Options under which ONNX Runtime computes what the file says (see `session`)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    if processor.saturates():  # elsewhere it would give up faster kernels for nothing
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # what it logs as an error it raises, too
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def session(
    model: str | Path | bytes | onnx.ModelProto, *, threads: int | None = None, optimize: bool = True,
    accuracy_level: int = 1,
) -> onnxruntime.InferenceSession:
    """A CPU session that computes what the file says.

    ONNX Runtime turns a dequantized weight and MatMul into a kernel (MatMulNBits) that quantizes activations on its
    own, unless `session.qdq_matmulnbits_accuracy_level = 1` keeps it from doing so. On x86 processors without VNNI its
    kernels of uint8 and int8 saturate; `session.x64quantprecision = 1` makes it store weights that may do so as uint8,
    for which it has exact kernels. It would do so on processors with VNNI, too, which need it not: there it stays
    unset.

    Args:
        model: a path, serialized bytes or a proto.
        threads: intra-op threads; ONNX Runtime's default where None.
        optimize: let ONNX Runtime rewrite the graph; without, it runs each operator as it stands, in float.
        accuracy_level: of files with weights alone quantized: 1 multiplies activations as they are, in float32; 4, the
            default of ONNX Runtime itself, gives 8 bits to each block of them first: faster, and not what the file
            says.

    Raises:
        ModelFileError: the file is missing or refused (see `exporters.reading`), or ONNX Runtime refuses it.
    """
    options = session_options(threads, accuracy_level)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    name = str(model) if isinstance(model, (str, Path)) else "the model"
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    # the bytes that were screened, not what the path names by then
    data = model if isinstance(model, bytes) else read_onnx(model).data
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelFileError(
            f"ONNX Runtime cannot load {name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def run(runner: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of the session, in its order, for torch inputs by name."""
    feed = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in inputs.items()}
    return [torch.from_numpy(np.asarray(value)) for value in runner.run(None, feed)]
