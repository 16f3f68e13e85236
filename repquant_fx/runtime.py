"""ONNX Runtime sessions for exported models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.reading import read_onnx


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options under which ONNX Runtime computes what the file says (see `session`)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 4  # what it logs as an error it raises, too
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def session(model: str | Path | bytes | onnx.ModelProto, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A CPU session that computes what the file says.

    ONNX Runtime may turn DequantizeLinear(INT4) + MatMul into a kernel that re-quantizes activations on its own;
    `session.qdq_matmulnbits_accuracy_level = 1` keeps it from doing so.

    Args:
        model: a path, serialized bytes or a proto.
        threads: intra-op threads; ONNX Runtime's default where None.

    Raises:
        ModelFileError: the file is missing or refused (see `exporters.reading`), or ONNX Runtime refuses it.
    """
    options = session_options(threads)
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
