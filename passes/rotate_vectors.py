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

from repquant_fx.passes.base import Pass, aten, attribute, constant_node
from repquant_fx.passes.norm_affine import affine_readers
from repquant_fx.passes.parameters import parameters, set_parameters, weight_and_bias, weight_of
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.passes.vector_spaces import Space
from repquant_fx.quantizers.affine import into_reader, scale_input
from repquant_fx.quantizers.rotation import gain_divides, rotate_columns, rotate_rows, rotate_vectors, rotated_bias


@dataclass(frozen=True)
class Rotation:
    """A space and its orthogonal matrix R of shape (size, size), float64: vectors x become x R."""

    space: Space
    matrix: Tensor


class RotateVectors(Pass):
    """Replaces the float32 constants that write and read vectors of C channels by their products with a matrix (C, C);
    shapes stay. A norm's gain and bias go into the Linears that read it first.
    """

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


def _fold_affine(graph_module: GraphModule, norm: Node, matrix: Tensor) -> None:
    """Gain and bias into the Linears that read the norm. Past zeros that are padded in, a bias cannot move: it stays,
    rotated.
    """
    gain, bias = parameters(graph_module, norm)
    sizes = gain if gain is not None else bias
    if sizes is None:
        return
    readers = affine_readers(graph_module, norm)
    assert readers is not None  # the flow has found so
    factor = torch.ones_like(sizes) if gain is None else gain
    stays = bias is not None and any(reader.padded for reader in readers)
    for linear in (reader.node for reader in readers):
        if bias is None or stays:
            set_parameters(graph_module, linear, scale_input(weight_of(graph_module, linear), factor), None)
        else:
            set_parameters(graph_module, linear, *into_reader(*weight_and_bias(graph_module, linear), factor, bias))
    kept = None if bias is None else rotated_bias(bias, factor, matrix) if stays else torch.zeros_like(bias)
    set_parameters(graph_module, norm, None if gain is None else torch.ones_like(gain), kept)


def gain_allows(graph_module: GraphModule, norm: Node) -> bool:
    """Whether a bias that must stay with its norm, for padding that follows, can be divided by the gain."""
    gain, bias = parameters(graph_module, norm)
    readers = affine_readers(graph_module, norm)
    if gain is None or bias is None or readers is None or not any(reader.padded for reader in readers):
        return True
    return gain_divides(gain)


def _write(graph_module: GraphModule, node: Node, block: int, matrix: Tensor) -> None:
    """`x -> x R` of what a node writes."""
    if node.op == "get_attr":
        value = rotate_vectors(attribute(graph_module, node).double(), matrix)
        new = constant_node(graph_module, str(node.target), value.float(), node)
        node.replace_all_uses_with(new)
        return
    weight, bias = weight_and_bias(graph_module, node)
    if node.target is aten.embedding.default:
        set_parameters(graph_module, node, rotate_vectors(weight, matrix), None)
        return
    new_bias = None if bias is None else rotate_rows(bias, matrix, block)
    set_parameters(graph_module, node, rotate_rows(weight, matrix, block), new_bias)


def _read(graph_module: GraphModule, node: Node, block: int, matrix: Tensor) -> None:
    """The inverse in the columns (of a convolution: the input channels) that read the vectors."""
    set_parameters(graph_module, node, rotate_columns(weight_of(graph_module, node), matrix, block), None)
