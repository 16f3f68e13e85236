"""Rotate channel vectors: an orthogonal matrix into what writes them, its inverse into what reads them.

An exact rewriting of the float model that adds no operator (see `vector_flow` for what may stand between). Where a norm
stands between, its gain and bias move into its readers first; a rotation that fixes the vector of ones commutes with
what is left of a LayerNorm, any rotation with what is left of an RMS norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.passes.base import Pass, aten, attribute, constant_node, replace_constant
from repquant_fx.passes.norm_affine import affine_readers
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.passes.vector_spaces import Space

SMALLEST_GAIN = 1e-3  # relative to the largest: below, a bias that stays with the norm cannot be divided by it


@dataclass(frozen=True)
class Rotation:
    """A space and its orthogonal matrix R of shape (size, size), float64: vectors x become x R."""

    space: Space
    matrix: Tensor


class RotateVectors(Pass):
    name = "rotate vectors"
    needs = "a canonical float graph, and rotations of spaces that `vector_flow` found in it"
    guarantees = "the same outputs; the vectors of the spaces are rotated, the operators are the same"
    takes = gives = CANONICAL
    identity = "float"

    def __init__(self, rotations: Sequence[Rotation]) -> None:
        super().__init__()
        self.rotations = rotations

    def run(self, graph_module: GraphModule) -> bool:
        for norm in dict.fromkeys(norm for each in self.rotations for norm in each.space.norms):
            _fold_affine(graph_module, norm, self._matrix_at(norm))
        for each in self.rotations:
            matrix = each.matrix
            for node, block in each.space.writers:
                _write(graph_module, node, block, matrix)
            for node, block in each.space.readers:
                _read(graph_module, node, block, matrix)
        return bool(self.rotations)

    def _matrix_at(self, norm: Node) -> Tensor:
        return next(each.matrix for each in self.rotations if norm in each.space.norms)


def _tensor(graph_module: GraphModule, node: Node, index: int) -> Tensor | None:
    argument = node.args[index] if index < len(node.args) else None
    return attribute(graph_module, argument).double() if isinstance(argument, Node) else None


def _name(node: Node, index: int, fallback: str) -> str:
    argument = node.args[index] if index < len(node.args) else None
    return str(argument.target) if isinstance(argument, Node) else fallback


def _put(graph_module: GraphModule, node: Node, index: int, value: Tensor, name: str) -> None:
    replace_constant(graph_module, node, index, value.float(), name)


def _fold_affine(graph_module: GraphModule, norm: Node, matrix: Tensor) -> None:
    """Gain and bias into the Linears that read the norm. Past zeros that are padded in, a bias cannot move: it stays,
    rotated.
    """
    gain, bias = _tensor(graph_module, norm, 2), _tensor(graph_module, norm, 3)
    if gain is None and bias is None:
        return
    readers = affine_readers(graph_module, norm)
    assert readers is not None  # the flow has found so
    sizes = gain if gain is not None else bias
    assert sizes is not None
    gain = torch.ones_like(sizes) if gain is None else gain
    stays = bias is not None and any(reader.padded for reader in readers)
    for reader in readers:
        linear = reader.node
        weight = _tensor(graph_module, linear, 1)
        assert weight is not None
        name = _name(linear, 1, "weight")
        if bias is not None and not stays:
            moved, own = weight @ bias, _tensor(graph_module, linear, 2)
            _put(
                graph_module,
                linear,
                2,
                moved if own is None else own + moved,
                _name(linear, 2, name.removesuffix("weight") + "bias"),
            )
        _put(graph_module, linear, 1, weight * gain, name)
    name = _name(norm, 2, "weight")
    if norm.args[2] is not None:
        _put(graph_module, norm, 2, torch.ones_like(gain), name)
    if bias is not None:
        kept = torch.zeros_like(bias)
        if stays:
            size = len(matrix)
            kept = ((bias / gain).unflatten(0, (-1, size)) @ matrix).flatten()
        _put(graph_module, norm, 3, kept, _name(norm, 3, "bias"))


def gain_allows(graph_module: GraphModule, norm: Node) -> bool:
    """Whether a bias that must stay with its norm, for padding that follows, can be divided by the gain."""
    gain, bias = _tensor(graph_module, norm, 2), _tensor(graph_module, norm, 3)
    readers = affine_readers(graph_module, norm)
    if gain is None or bias is None or readers is None or not any(reader.padded for reader in readers):
        return True
    return bool(gain.abs().min() > SMALLEST_GAIN * gain.abs().max())


def _write(graph_module: GraphModule, node: Node, block: int, matrix: Tensor) -> None:
    """`x -> x R` of what a node writes: W^T R, and b R."""
    size = len(matrix)
    rows = slice(block * size, (block + 1) * size)
    if node.op == "get_attr":
        value = attribute(graph_module, node)
        new = constant_node(graph_module, str(node.target), (value.double() @ matrix).float(), node)
        node.replace_all_uses_with(new)
        return
    if node.target is aten.embedding.default:
        table = _tensor(graph_module, node, 0)
        assert table is not None
        _put(graph_module, node, 0, table @ matrix, _name(node, 0, "weight"))
        return
    weight, bias = _tensor(graph_module, node, 1), _tensor(graph_module, node, 2)
    assert weight is not None
    weight = weight.clone()
    weight[rows] = torch.tensordot(matrix.T, weight[rows], dims=1)
    _put(graph_module, node, 1, weight, _name(node, 1, "weight"))
    if bias is not None:
        bias = bias.clone()
        bias[rows] = bias[rows] @ matrix
        _put(graph_module, node, 2, bias, _name(node, 2, "bias"))


def _read(graph_module: GraphModule, node: Node, block: int, matrix: Tensor) -> None:
    """`W R` on the columns (of a convolution: the input channels) that read the vectors."""
    size = len(matrix)
    weight = _tensor(graph_module, node, 1)
    assert weight is not None
    weight = weight.clone()
    columns = weight.narrow(1, block * size, size)
    columns.copy_(torch.tensordot(columns, matrix, dims=([1], [0])).movedim(-1, 1))
    _put(graph_module, node, 1, weight, _name(node, 1, "weight"))
