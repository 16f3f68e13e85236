"""Mask attention by an addition instead of a choice.

`where(mask, scores, lowest)` looks at every score of every head. A number as low as those that models fill in swallows
any score that it is added to, so `scores + where(mask, 0, lowest)` is the same, bit for bit, and the second term is
small (it has no heads) and equal in all layers: the exporter writes it once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from repquant_fx.naming import MASK_CLOSED, MASK_OPEN
from repquant_fx.passes.base import Pass, aten, attribute, constant_node, copy_meta, is_constant, is_tensor, shape_of
from repquant_fx.passes.channel_flow import hinted
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import LOG2_SOFTMAX, SOFTMAX
from repquant_fx.passes.spec import RUNTIME

SWALLOWS = -1e30  # float32 has 24 bits of precision: scores up to 1e22 vanish


class ShareMasks(Pass):
    """Scores are float32 of shape (..., heads, queries, keys); a mask is boolean and broadcasts to them."""

    name = "share masks"
    needs = "tensor metadata"
    guarantees = (
        "a mask that fills a Softmax's input with a very low number is added; the outputs are unchanged for scores "
        "below 1e22"
    )
    takes = gives = RUNTIME

    def run(self, graph_module: GraphModule) -> bool:
        matches = []
        for node in graph_module.graph.nodes:
            match = _match(graph_module, node)
            if isinstance(match, str):
                self.leave(node, match)
            elif match is not None:
                matches.append((node, *match))
        constants: dict[float, Node] = {}

        def constant(value: float) -> Node:
            if value not in constants:
                first = next(iter(graph_module.graph.nodes))
                constants[value] = constant_node(
                    graph_module, MASK_OPEN if value == 0 else MASK_CLOSED, torch.tensor(value), first
                )
            return constants[value]

        for node, scores, mask, when_true, lowest in matches:
            chosen = (constant(lowest), constant(0.0)) if when_true else (constant(0.0), constant(lowest))
            with graph_module.graph.inserting_before(node):
                bias = copy_meta(node, graph_module.graph.call_function(aten.where.self, (mask, *chosen)))
                masked = copy_meta(node, graph_module.graph.call_function(aten.add.Tensor, (scores, bias)))
            node.replace_all_uses_with(masked)
            graph_module.graph.erase_node(node)
        if matches:
            refresh_metadata(graph_module)
        return bool(matches)


def _match(graph_module: GraphModule, node: Node) -> tuple[Node, Node, bool, float] | str | None:
    """(scores, mask, whether a true mask fills, the low number) of a filling that a Softmax alone reads, and that
    repeats its mask.

    None for what no Softmax reads; the reason, in words, for another filling before one.
    """
    if node.target is aten.masked_fill.Scalar:
        scores, mask, fill = node.args
        when_true = True
    elif node.target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
        mask, when, otherwise = node.args
        when_true = is_constant(when) or not isinstance(when, Node)
        fill, scores = (when, otherwise) if when_true else (otherwise, when)
    else:
        return None
    softmaxes = [user.target in SOFTMAX or user.target is LOG2_SOFTMAX for user in node.users]
    if not any(softmaxes):
        return None
    lowest = _number(graph_module, fill)
    if lowest is None or lowest > SWALLOWS:
        return (
            "what it fills in is no constant"
            if lowest is None
            else f"{lowest:g} is not low enough to swallow any score it is added to"
        )
    if not all(softmaxes):
        return "not only a Softmax reads the masked scores"
    if not isinstance(scores, Node) or not isinstance(mask, Node) or not is_tensor(scores) or not is_tensor(mask):
        return "scores or mask are no tensor"
    if (
        scores.meta["val"].dtype != torch.float32
        or mask.meta["val"].dtype != torch.bool
        or len(shape_of(scores)) != len(shape_of(node))
    ):
        return "scores are not float32 of the result's rank, or the mask is not boolean"
    smaller = math.prod(hinted(mask)) < math.prod(hinted(node)) and hinted(scores) == hinted(node)
    return (scores, mask, when_true, lowest) if smaller else "the mask is as large as the scores"


def _number(graph_module: GraphModule, value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and is_constant(value) and attribute(graph_module, value).numel() == 1:
        return float(attribute(graph_module, value))
    return None
