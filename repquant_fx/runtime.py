"""ONNX Runtime sessions for exported models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from repquant_fx import processor
from repquant_fx.errors import ModelFileError
from repquant_fx.exporters.apart import OnnxModel, is_large
from repquant_fx.exporters.reading import OnnxFile, read_onnx

Loadable: TypeAlias = str | Path | bytes | onnx.ModelProto | OnnxModel | OnnxFile


def session_options(
    threads: int | None = None, accuracy_level: int = 1, spin: bool = True
) -> onnxruntime.SessionOptions:
    """Options under which ONNX Runtime computes what the file says (see `session`)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    if processor.saturates():  # elsewhere it would give up faster kernels for nothing
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # what it logs as an error it raises, too
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def session(
    model: Loadable, *, threads: int | None = None, optimize: bool = True, accuracy_level: int = 1,
    spin: bool = True,
) -> onnxruntime.InferenceSession:
    """A CPU session that computes what the file says.

    ONNX Runtime turns a dequantized weight and MatMul into a kernel (MatMulNBits) that quantizes activations on its
    own, unless `session.qdq_matmulnbits_accuracy_level = 1` keeps it from doing so. On x86 processors without VNNI its
    kernels of uint8 and int8 saturate; `session.x64quantprecision = 1` makes it store weights that may do so as uint8,
    for which it has exact kernels. It would do so on processors with VNNI, too, which need it not: there it stays
    unset.

    Args:
        model: a path, serialized bytes, a proto, or one of these with its matrices apart.
        threads: intra-op threads; ONNX Runtime's default where None.
        optimize: let ONNX Runtime rewrite the graph; without, it runs each operator as it stands, in float.
        accuracy_level: of files with weights alone quantized: 1 multiplies activations as they are, in float32; 4, the
            default of ONNX Runtime itself, gives 8 bits to each block of them first: faster, and not what the file
            says.
        spin: let threads wait for the next run awake for a while, as ONNX Runtime does by default; without, they sleep
            as soon as a run has ended, and take no time from another session whose turn it is.

    Raises:
        ModelFileError: the file is missing or refused (see `exporters.reading`), or ONNX Runtime refuses it.
    """
    options = session_options(threads, accuracy_level, spin)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    name = str(model) if isinstance(model, (str, Path)) else "the model"
    data, apart = content(model)
    kept = give(options, apart)
    try:
        found = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        if kept:
            found.kept = kept
        return found
    except Exception as error:
        raise ModelFileError(
            f"ONNX Runtime cannot load {name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def content(model: Loadable) -> tuple[bytes, OnnxModel | None]:
    """The bytes of a model, and the model with what lies apart from it; None of bytes alone. Of a path those that were
    screened, not what the path names by then.

    Raises:
        ModelFileError: the file is missing or refused.
    """
    if isinstance(model, (str, Path)):
        model = read_onnx(model)
    if isinstance(model, OnnxFile):
        return model.data, model.apart
    if isinstance(model, bytes):
        return model, None
    model = OnnxModel.of(model)
    return model.proto.SerializeToString(), model


def give(options: onnxruntime.SessionOptions, model: OnnxModel | None) -> list[onnxruntime.OrtValue]:
    """Give a session the files that its model refers to, so that it opens none; they must live until it is made.

    Returns:
        what it does not copy, and what must live as long as it does: matrices past 2 GiB, which ONNX Runtime takes from
        no file in memory.
    """
    if model is None or not model.files:
        return []
    options.add_external_initializers_from_files_in_memory(
        list(model.files), list(model.files.values()), [len(each) for each in model.files.values()])
    large = [tensor for tensor in model.proto.graph.initializer if is_large(tensor)]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(model.view(tensor)) for tensor in large]
    if values:
        options.add_external_initializers([tensor.name for tensor in large], values)
    return values


def run(runner: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of the session, in its order, for torch inputs by name."""
    feed = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in inputs.items()}
    return [torch.from_numpy(np.asarray(value)) for value in runner.run(None, feed)]
