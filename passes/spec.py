"""What a legal graph is at each stage of a compile: its operators, and the dtypes that those of Q/DQ take and give.

| stage | spelling | operators of `repquant_fx` | integer codes are read by | modules |
|---|---|---|---|---|
| captured | as torch.export gives it | none | - | none |
| canonical | no identities, views are reshapes | `affine` | - | none |
| observed | the same | `affine`, `dequantize` of weights | `dequantize` | an observer or quantizer at every site |
| lowered | the same | all | `dequantize` | none |
| runtime | the same | all | `dequantize`, layout operators, what appends to caches, and outputs | none |

Dtypes are checked where `meta["val"]` tells them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.operators import (
    AFFINE,
    ASSERTIONS,
    DEQUANTIZE,
    IDENTITIES,
    LOG2_QUANTIZE,
    LOG2_SOFTMAX,
    MOVES,
    QUANTIZE,
    VIEWS,
)

aten = torch.ops.aten
SPELLED_OTHERWISE = frozenset(IDENTITIES | VIEWS | ASSERTIONS)

SITE = "site"  # key in the meta data of a slot's node: the name of its site
FLOAT, CODES = frozenset({torch.float32}), frozenset({torch.uint8})
CONSTANT_CODES = frozenset({torch.uint8, torch.int8, torch.int32})
# dtypes of the tensors each takes, in order, and of what it gives
SIGNATURES: dict[object, tuple[tuple[frozenset[torch.dtype], ...], frozenset[torch.dtype]]] = {
    AFFINE: ((FLOAT, FLOAT, FLOAT), FLOAT),
    QUANTIZE: ((FLOAT, FLOAT, CODES), CODES),
    DEQUANTIZE: ((CONSTANT_CODES, FLOAT, CONSTANT_CODES), FLOAT),
    LOG2_SOFTMAX: ((FLOAT, FLOAT), FLOAT),
    LOG2_QUANTIZE: ((FLOAT, FLOAT), FLOAT),
}


@dataclass(frozen=True)
class Stage:
    """A form of the graph.

    Attributes:
        operators: those of `repquant_fx` that it may hold.
        readers: what may read integer codes of activations.
        slots: whether observers and quantizers are called as modules.
        spelled: whether each operation has its one spelling.
    """

    name: str
    operators: frozenset[object] = frozenset()
    readers: frozenset[object] = frozenset({DEQUANTIZE})
    slots: bool = False
    spelled: bool = True

    def check(self, graph_module: GraphModule) -> None:
        """
        Raises:
            PassError: the graph is not in this form; names the first node that is not.
        """
        codes: set[Node] = set()
        for node in graph_module.graph.nodes:
            why = self._wrong(node) or _wrong_types(node) or _wrong_reader(node, codes, self.readers)
            if why:
                raise PassError(f"the graph is not {self.name}: {node.name} ({node.target}) {why}")

    def _wrong(self, node: Node) -> str | None:
        if node.op == "call_module":
            return None if self.slots and SITE in node.meta else "calls a module"
        if node.op == "call_method":
            return "calls a method"
        if node.op != "call_function":
            return None
        if self.spelled and node.target in SPELLED_OTHERWISE:
            return "has another spelling in a canonical graph"
        if node.target in SIGNATURES and node.target not in self.operators:
            return "belongs to a later form"
        return None


def _wrong_types(node: Node) -> str | None:
    """Dtypes of an operator of `repquant_fx`, where they are known."""
    if node.target not in SIGNATURES:
        return None
    takes, gives = SIGNATURES[node.target]
    for argument, allowed in zip(node.args, takes):
        dtype = _dtype(argument)
        if dtype is not None and dtype not in allowed:
            return f"reads {argument} of {dtype}, not {_either(allowed)}"
    dtype = _dtype(node)
    return f"gives {dtype}, not {_either(gives)}" if dtype is not None and dtype not in gives else None


def _wrong_reader(node: Node, codes: set[Node], readers: frozenset[object]) -> str | None:
    """Codes of activations go to `readers` alone; `codes` is brought up to date."""
    if node.target is QUANTIZE:
        codes.add(node)
    elif any(parent in codes for parent in node.all_input_nodes) and node.target is not aten.sym_size.int:
        if node.target not in readers:
            return "reads integer codes"
        if node.target is not DEQUANTIZE:
            codes.add(node)
    return None


def _dtype(value: object) -> torch.dtype | None:
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    return tensor.dtype if isinstance(tensor, Tensor) else None


def _either(dtypes: frozenset[torch.dtype]) -> str:
    return " or ".join(sorted(map(str, dtypes)))


CAPTURED = Stage("captured", spelled=False)
CANONICAL = Stage("canonical", frozenset({AFFINE}))
OBSERVED = Stage("observed", frozenset({AFFINE, DEQUANTIZE}), slots=True)
LOWERED = Stage("lowered", frozenset(SIGNATURES))
RUNTIME = Stage("in runtime form", frozenset(SIGNATURES), frozenset({DEQUANTIZE, *MOVES, "output"}))
