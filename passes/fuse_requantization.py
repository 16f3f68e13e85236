"""Let a Linear write the integer codes of the attention operands that read it.

`Linear -> reshape, split, permute, times 1/sqrt(d) -> quantize` runs, as written, as an integer product with a float
result that is moved about and quantized later, once per operand. Layout operators commute with quantization, and so
does a constant factor. The operands' scales and zero points go into the Linear instead: row r of the weight's scale is
divided by the scale of the operand that row feeds. Then *one* quantization with scale 1 right behind the Linear gives
every operand's codes, ONNX Runtime fuses it into the integer product, and a quarter of the bytes is moved about.

That quantization has one zero point, the first operand's. Where another operand's differs, the difference goes into the
bias, which is an integer in steps of the product's accumulator: the value that is rounded moves by up to half such a
step. A code can change by one, and only where its value lay nearer to the midpoint of two codes than that; a Linear
whose accumulator is so coarse that this could exceed `SLACK` of a code stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from repquant_fx.naming import QUANTIZED, SCALE, ZERO_POINT, beside
from repquant_fx.passes.base import (
    Made,
    Pass,
    aten,
    attribute,
    constant_node,
    copy_meta,
    free_stem,
    is_constant,
    replace_constant,
)
from repquant_fx.passes.channel_flow import hint, hinted
from repquant_fx.passes.metadata import refresh_metadata
from repquant_fx.passes.operators import CODE_MOVES, DEQUANTIZE, QUANTIZE
from repquant_fx.passes.spec import RUNTIME
from repquant_fx.quantizers.requantization import Codes, Operand, requantize

SLACK = 1 / 16  # of a code: how far an operand's values may move to meet the grid of the accumulator


@dataclass(frozen=True)
class Branch:
    """An operand that a Linear feeds: the node that quantizes it, and the constant factor on the way."""

    quantize: Node
    factor: float


@dataclass(frozen=True)
class Fused:
    """Where codes come from now.

    Attributes:
        quantizers: the node that produces each site's codes, by site name.
        codes: the Linears that write codes, by name.
    """

    quantizers: dict[str, Node]
    codes: dict[str, Codes]


class FuseRequantization(Pass[Fused]):
    """Makes the `quantizers` of `Lowered` anew. A fused Linear gives (rows, out) in steps of each operand's scale (its
    weight's float32 scale (out,) is divided by it), and one quantizer of scale 1 turns them into uint8.
    """

    name = "fuse requantization"
    needs = "a graph lowered to Q/DQ"
    guarantees = (
        "Linears that only quantized operands read write codes; on the same inputs every code is the same, or the "
        "other one of the two that its value lay between, no further than SLACK from their midpoint"
    )
    takes = gives = RUNTIME

    def __init__(self, quantizers: dict[str, Node]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def run(self, graph_module: GraphModule) -> Made[Fused]:
        fused = Fused(dict(self.quantizers), {})
        for linear in list(graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)):
            done = _fuse(graph_module, linear, fused.quantizers)
            if isinstance(done, Codes):
                fused.codes[linear.name] = done
            elif done is not None:
                self.leave(linear, done)
        if fused.codes:
            graph_module.graph.eliminate_dead_code()
            refresh_metadata(graph_module)
        return Made(bool(fused.codes), fused)


def _fuse(graph_module: GraphModule, linear: Node, quantizers: dict[str, Node]) -> Codes | str | None:
    """Fuse one Linear, and bring `quantizers` up to date.

    Returns:
        what it gives now; the reason where it was not fused, None where no operand of a product reads it.
    """
    source, weight, bias = (*linear.args, None)[:3]
    found = list(_branches(graph_module, linear, 1.0))
    branches = [branch for branch in found if branch is not None]
    if not branches or (len(found) == 1 and branches[0].quantize.args[0] is linear):
        return None  # in the second case it writes codes already
    if len(branches) != len(found):
        return "not only quantized operands read it"
    if not (
        _constant_codes(weight) and (bias is None or _constant_codes(bias)) and _per_tensor(graph_module, source)
    ):
        return "its input, weight and bias are not all integer codes of its own"
    rows = _rows(linear, branches)
    if rows is None or len({b.quantize.args[3] for b in branches}) != 1 or any(b.factor <= 0 for b in branches):
        return "its operands share channels, differ in bits, or are multiplied by a negative number"
    scale, zero_point = (partial(_constant, graph_module, index=index) for index in (1, 2))
    operands = [Operand(channels, scale(branch.quantize).double() / branch.factor, zero_point(branch.quantize).double())
                for branch, channels in zip(branches, rows)]
    new = requantize(scale(source), scale(weight), None if bias is None else _constant(graph_module, bias, 0), operands)
    if new is None:
        return "its scales or its bias leave the range of float32 or int32"
    if new.apart > SLACK:
        return f"a zero point in its bias would move an operand by {new.apart:.2g} of a code"
    scale_name = str(_argument(weight, 1).target)
    weight_name = SCALE.stem(scale_name) or scale_name
    bias_stem = free_stem(graph_module, beside(weight_name, "bias"))
    replace_constant(graph_module, cast(Node, weight), 1, new.weight_scale, scale_name)
    if isinstance(bias, Node):
        replace_constant(graph_module, bias, 0, new.bias.codes, QUANTIZED.of(bias_stem))
        replace_constant(graph_module, bias, 1, new.bias.scale, SCALE.of(bias_stem))
    elif bool(new.bias.codes.any()):
        constants = (constant_node(graph_module, QUANTIZED.of(bias_stem), new.bias.codes, linear),
                     constant_node(graph_module, SCALE.of(bias_stem), new.bias.scale, linear))
        with graph_module.graph.inserting_before(linear):
            restored = copy_meta(linear, graph_module.graph.call_function(DEQUANTIZE, (*constants, None, 32, 0)))
        linear.args = (source, weight, restored)
    shared = zero_point(branches[0].quantize)
    moved = _move_quantizer(graph_module, linear, branches, beside(weight_name, "output"), shared)
    quantizers |= {name: moved[node] for name, node in quantizers.items() if node in moved}
    return new.output


def _move_quantizer(
    graph_module: GraphModule, linear: Node, branches: Sequence[Branch], name: str, zero_point: Tensor
) -> dict[Node, Node]:
    """One quantizer behind the Linear; the operands read its codes through the layout operators that were there.

    Returns:
        what gives each operand's codes, by the node that quantized it and is gone.
    """
    graph, after, stem = graph_module.graph, linear.next, free_stem(graph_module, name)
    one = constant_node(graph_module, SCALE.of(stem), torch.tensor(1.0), after)
    zero = constant_node(graph_module, ZERO_POINT.of(stem), zero_point, after)
    with graph.inserting_before(after):
        quantize = copy_meta(
            linear, graph.call_function(QUANTIZE, (linear, one, zero, branches[0].quantize.args[3], -1))
        )
    linear.replace_all_uses_with(quantize, delete_user_cb=lambda user: user is not quantize)
    moved: dict[Node, Node] = {}
    for branch in branches:
        codes = cast(Node, branch.quantize.args[0])
        while _factor(codes) is not None:
            codes = cast(Node, codes.args[0])
        branch.quantize.replace_all_uses_with(codes)
        moved[branch.quantize] = codes
        graph.erase_node(branch.quantize)
    for node in list(graph.nodes):  # the factors are in the scales now
        if _factor(node) is not None and _root(node) is quantize:
            node.replace_all_uses_with(cast(Node, node.args[0]))
            graph.erase_node(node)
    return moved


def _branches(graph_module: GraphModule, node: Node, factor: float) -> Iterator[Branch | None]:
    """The quantized operands that `node` feeds through layout operators and constant factors; None for any other
    reader.
    """
    for user in node.users:
        if user.target is QUANTIZE and user.args[0] is node and attribute(graph_module, _argument(user, 1)).ndim == 0:
            yield Branch(user, factor)
        elif user.target in CODE_MOVES:
            yield from _branches(graph_module, user, factor)
        elif (constant := _factor(user)) is not None:
            yield from _branches(graph_module, user, factor * constant)
        elif user.target is not aten.sym_size.int:
            yield None


def _rows(linear: Node, branches: Sequence[Branch]) -> list[Tensor] | None:
    """Which output channels of the Linear each branch reads; None where two branches share one.

    Found by sending the channels' numbers through the operators between, at the example sizes.
    """
    outputs = linear.meta["val"].shape[-1]
    values: dict[Node, Any] = {linear: torch.arange(outputs).expand(hinted(linear))}

    def known(node: Node) -> Any:
        if node in values:
            return values[node]
        size = node.meta["val"]
        return size if isinstance(size, Tensor) else hint(size)

    def value(node: Node) -> Any:
        if node not in values:
            source = value(cast(Node, node.args[0]))
            if _factor(node) is None:
                args, kwargs = map_arg((node.args[1:], node.kwargs), known)
                source = cast(Any, node.target)(source, *args, **kwargs)
            values[node] = source
        return values[node]

    rows = [torch.unique(value(cast(Node, branch.quantize.args[0]))) for branch in branches]
    return rows if len(torch.cat(rows).unique()) == sum(map(len, rows)) else None


def _root(node: Node) -> Node:
    """Back through layout operators and factors."""
    while node.target in CODE_MOVES or _factor(node) is not None:
        node = cast(Node, node.args[0])
    return node


def _factor(node: Node) -> float | None:
    """The number that a node multiplies its one tensor by."""
    if (
        node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
        and not node.kwargs
        and isinstance(node.args[0], Node)
    ):
        number = node.args[1]
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number != 0:
            return float(number) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / float(number)
    return None


def _constant_codes(node: object) -> bool:
    """Whether a node dequantizes constant codes for one reader."""
    return isinstance(node, Node) and node.target is DEQUANTIZE and is_constant(node.args[0]) and len(node.users) == 1


def _per_tensor(graph_module: GraphModule, node: object) -> bool:
    return (
        isinstance(node, Node) and node.target is DEQUANTIZE and attribute(graph_module, _argument(node, 1)).ndim == 0
    )


def _constant(graph_module: GraphModule, node: object, index: int) -> Tensor:
    """The constant that a node reads as one of its arguments."""
    return attribute(graph_module, _argument(node, index))


def _argument(node: object, index: int) -> Node:
    return cast(Node, cast(Node, node).args[index])
