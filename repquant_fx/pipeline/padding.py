"""Padding: which positions of a graph's values count, as the attention mask of each batch says.

What a model computes at padded tokens is read by nobody, so it must not be calibrated on. The mask is taken through the
graph as the tokens are: operators that move elements are run on it, what is computed element by element counts where
all its operands do, and a sum counts where one of its terms does. So a row of attention's probabilities counts where
its query does and in it the keys that do, and padded keys and values do not. A value that comes through any other
operator counts everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from repquant_fx.passes.base import aten, is_tensor, shape_of
from repquant_fx.passes.caches import caches
from repquant_fx.passes.operators import AFFINE, CASTS, ELEMENT_WISE, MASKS, MATMULS, MOVES, NORMS, REDUCTIONS, SOFTMAX

MASKS_OF_TOKENS = ("attention_mask", "encoder_attention_mask")  # names in transformers: not 0 where a token is real
ENDS = "ends"  # in the `meta` of an input of ids: tokens at which and after which none counts, but for the first
# the result is of the operand's shape, and counts where it does
ALIKE = CASTS | ELEMENT_WISE | MASKS | NORMS | SOFTMAX | {AFFINE}


@dataclass(frozen=True)
class Padding:
    """Which positions count.

    Attributes:
        by_batch: for each batch, by the node's name, what `counts` gives; nodes that count everywhere are not there.
    """

    by_batch: Sequence[Mapping[str, Tensor]] = ()

    def counts(self, number: int, name: str) -> Tensor | None:
        """Of what the node `name` gives in a batch: boolean, of its rank, broadcasts to it. None where all counts."""
        return self.by_batch[number].get(name) if number < len(self.by_batch) else None


def find_padding(graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> Padding:
    """What counts in each batch of a graph, by its masks and the tokens that end a text. Costs nothing where the graph
    has none, or they leave nothing out.

    Names hold for every copy of the graph, and for what passes leave of it.

    Args:
        batches: positional inputs of the graph, one tuple per batch.
    """
    inputs = _inputs(graph_module)
    masks = [index for index, node in enumerate(inputs) if node.target in MASKS_OF_TOKENS]
    ids = [index for index, node in enumerate(inputs) if node.meta.get(ENDS)]
    real = [{index: batch[index] != 0 for index in masks} |
            {index: _before_end(batch[index], inputs[index].meta[ENDS]) for index in ids} for batch in batches]
    if all(bool(counts.all()) for each in real for counts in each.values()):
        return Padding()
    found = [_Walk(graph_module, batch, each).found() for batch, each in zip(batches, real)]
    # what is padding in every sample is read all the same, such as the first of tokens that are padded on the left
    empty = {name for name in found[0] if not any(bool(each[name].any()) if name in each else True for each in found)}
    return Padding([{name: counts for name, counts in each.items() if name not in empty} for each in found])


def _inputs(graph_module: GraphModule) -> list[Node]:
    return list(graph_module.graph.find_nodes(op="placeholder"))


def _before_end(ids: Tensor, ends: Sequence[int]) -> Tensor:
    ended = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    ended[:, :1] = False
    return ended.cumsum(1) == 0


class _Unknown(Exception):
    """A size is not known before the model runs."""


class _Walk:
    """The masks of one batch on their way through the graph.

    Attributes:
        counts: by node, boolean, of the value's rank, with 1 along the axes on which it does not change; tuples for
            what gives several tensors.
    """

    def __init__(self, graph_module: GraphModule, batch: tuple[Tensor, ...], real: Mapping[int, Tensor]) -> None:
        """Args:
            real: boolean (samples, tokens), by the place of the input that tells: a mask, or ids with an end.
        """
        self.graph_module, self.counts, self.sizes = graph_module, dict[Node, Any](), dict[Any, int]()
        inputs = _inputs(graph_module)
        self.device = batch[0].device
        empty = bool(caches(graph_module))  # then the mask is of the tokens given, whatever its symbol
        for node, tensor in zip(inputs, batch):
            self.sizes |= {s.node.expr: n for s, n in zip(shape_of(node), tensor.shape) if isinstance(s, torch.SymInt)}
        for place, mask in real.items():
            tokens = list(map(str, shape_of(inputs[place])))  # to compare symbols would bind them
            is_mask = inputs[place].target in MASKS_OF_TOKENS
            for node, tensor in zip(inputs, batch):
                shape = shape_of(node)
                # ids of the tokens, or their embeddings
                alike = list(map(str, shape[:2])) == tokens or (empty and tensor.shape[:2] == mask.shape)
                alike = alike and len(shape) in (2, 3) if is_mask else node is inputs[place]
                if alike and not (is_mask and node is inputs[place]) and not mask.all():
                    self.counts[node] = mask.reshape(*mask.shape, *(1,) * (len(shape) - 2))

    def found(self) -> dict[str, Tensor]:
        """By the node's name; equal ones are one tensor."""
        distinct: list[Tensor] = []
        for node in self.graph_module.graph.nodes if self.counts else ():
            if node.op in ("call_function", "call_module") and any(n in self.counts for n in node.all_input_nodes):
                try:
                    result = self._through(node)
                except (_Unknown, RuntimeError, NotImplementedError):  # a size, or an operator that takes no booleans
                    result = None
                if isinstance(result, Tensor) and not any(result is known for known in distinct):
                    result = _narrowed(result.reshape((1,) * (len(shape_of(node)) - result.ndim) + result.shape))
                    same = next((d for d in distinct if d.shape == result.shape and torch.equal(d, result)), None)
                    distinct += [result] if same is None else []
                    result = result if same is None else same
                if result is not None and not (isinstance(result, Tensor) and bool(result.all())):
                    self.counts[node] = result
        return {node.name: counts for node, counts in self.counts.items() if isinstance(counts, Tensor)}

    def _through(self, node: Node) -> Any:
        """What counts of the result; None where all does, or nobody knows."""
        target, first = node.target, node.args[0] if node.args else None
        if node.op == "call_module":  # a slot gives what it takes
            return self.counts[cast(Node, first)]
        if target in MOVES:
            args, kwargs = map_arg((node.args, node.kwargs), self._whole)
            result = cast(Any, target)(*args, **kwargs)
            return tuple(result) if isinstance(result, list) else result
        if target in MATMULS:
            return self._product(*cast("tuple[Node, Node]", node.args[:2]))
        if target is aten.embedding.default:
            ids = self.counts.get(cast(Node, node.args[1]))
            return None if ids is None else ids.unsqueeze(-1)
        if target is aten.linear.default:
            return self.counts[cast(Node, first)].any(-1, keepdim=True) if first in self.counts else None
        if target in REDUCTIONS:
            return self._reduced(node)
        if target in ALIKE or torch.Tag.pointwise in getattr(target, "tags", ()):
            operands = [self.counts[n] for n in node.all_input_nodes if n in self.counts]
            result = operands[0]
            for other in operands[1:]:
                result = result if other is result else result & other
            return result
        return None

    def _product(self, left: Node, right: Node) -> Tensor | None:
        """A sum counts where one of its terms does: both factors of it."""
        if min(len(shape_of(left)), len(shape_of(right))) < 2:
            return None
        everywhere = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        a, b = self.counts.get(left, everywhere), self.counts.get(right, everywhere)
        terms = max(a.shape[-1], b.shape[-2])
        a, b = a.expand(*a.shape[:-1], terms), b.expand(*b.shape[:-2], terms, b.shape[-1])
        return torch.matmul(a.float(), b.float()) > 0

    def _reduced(self, node: Node) -> Tensor | None:
        given: tuple[Any, ...] = node.args
        dims: Any = given[1] if len(given) > 1 else node.kwargs.get("dim")
        if not dims:
            return None
        keep, counts = given[2] if len(given) > 2 else node.kwargs.get("keepdim", False), self.counts[given[0]]
        places = [int(d) % counts.ndim for d in dims]
        for place in places:
            counts = counts.any(place, keepdim=True)
        return counts if keep else counts.squeeze(places)

    def _whole(self, node: Node) -> Any:
        """An argument of what moves elements: what counts, at the value's whole size; a size as a number."""
        value = node.meta.get("val")
        if isinstance(self.counts.get(node), tuple):
            return self.counts[node]
        if not is_tensor(node):
            return self._size(value)
        counts = self.counts.get(node, torch.ones((), dtype=torch.bool, device=self.device))
        return counts.expand([self._size(size) for size in shape_of(node)])

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        if not isinstance(size, torch.SymInt):
            raise _Unknown
        expression = size.node.expr
        if expression not in self.sizes:
            known = expression.subs(self.sizes)
            if known.free_symbols:
                raise _Unknown
            self.sizes[expression] = int(known)
        return self.sizes[expression]


def _narrowed(counts: Tensor) -> Tensor:
    """With one entry along each axis on which it does not change."""
    for axis, size in enumerate(counts.shape):
        first = counts.narrow(axis, 0, min(1, size))
        if size > 1 and (counts.stride(axis) == 0 or torch.equal(first.expand(counts.shape), counts)):
            counts = first
    return counts
