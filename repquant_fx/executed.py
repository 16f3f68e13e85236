"""What OpenVINO makes of each node of a file: read from the graph that it executes.

Its low-precision passes rename and merge nodes; an executed node lists the nodes that it stands for in
`originalLayersNames`, among them `blocks.0.attn/MatMul` or what was made of it, `blocks.0.attn/MatMul/...`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repquant_fx.runtimes import OPENVINO_FLOAT32, Model, compile_openvino

PRODUCTS = {"FullyConnected", "MatMul", "Gemm", "Convolution", "Subgraph"}


def executed_kernels(model: Model, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """(what runs in a node's place, whether it multiplies integers), by the node's name; absent where it is not found.

    Args:
        model: an ONNX model.
        names: of nodes that are products.

    Raises:
        ModelFileError: OpenVINO refuses the model.
    """
    wanted, found = set(names), dict[str, tuple[str, bool]]()
    for operator in compile_openvino(model, OPENVINO_FLOAT32).get_runtime_model().get_ordered_ops():
        info = operator.get_rt_info()
        kind, precision = _text(info, "layerType"), _text(info, "runtimePrecision")
        if kind not in PRODUCTS:
            continue
        for original in [operator.get_friendly_name(), *_text(info, "originalLayersNames").split(",")]:
            name = _owner(original, wanted)
            if name is not None and name not in found:
                found[name] = (f"{kind} in {precision}", precision in ("i8", "u8"))
    return found


def _text(info: Any, key: str) -> str:
    if key not in info:
        return ""
    value = info[key]
    return str(value.astype(str) if hasattr(value, "astype") else value)


def _owner(original: str, wanted: set[str]) -> str | None:
    """The wanted node that an executed one stands for: of that name, or of the start of it."""
    while original:
        if original in wanted:
            return original
        original = original.rpartition("/")[0]
    return None
