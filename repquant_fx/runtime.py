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


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options under which ONNX Runtime computes what the file says (see `session`)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
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
        ModelFileError: the file is missing or ONNX Runtime refuses it.
    """
    options = session_options(threads)
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelFileError(f"no such file: {model}")
    try:
        return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else str(model)
        raise ModelFileError(f"ONNX Runtime cannot load {name}: {str(error).splitlines()[0]}") from error


def run(runner: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of the session, in its order, for torch inputs by name."""
    feed = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in inputs.items()}
    return [torch.from_numpy(np.asarray(value)) for value in runner.run(None, feed)]
