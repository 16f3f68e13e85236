"""Cross-layer equalization past the norm: per-channel factors (and shifts) go into the rows of one layer's weight and,
undone, into the columns of the next one's.

An exact rewriting of the float model, done before anything is quantized, so that one scale per tensor fits all
channels:

- the values of attention: rows of the value projection, undone in the columns of the output projection. Rows of a
  Softmax sum to 1, so a shift passes too, into the output projection's bias;
- keys: what all of them have in common, which a Softmax cannot see;
- queries and keys: opposite factors, and the same shift of the keys;
- a layer that reads another one's output through ReLU or as one factor of a gated product (`act(gate) * up`).

Which constants can take part follows from `channel_flow`, whatever the model; with rotary embedding, for instance, it
finds that the two channels of a rotated pair must share a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.naming import site_operand
from repquant_fx.passes.base import Pass, aten, is_constant, is_float32, module_path, shape_of
from repquant_fx.passes.channel_flow import FIXED, ChannelFlow, is_empty, leads_to_softmax
from repquant_fx.passes.match_sites import Plan
from repquant_fx.passes.operators import NORMS, PARAMETERS
from repquant_fx.passes.parameters import set_parameters, weight_and_bias, weight_of
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.quantizers.affine import into_reader, into_writer, scale_input
from repquant_fx.quantizers.equalization import Equalization
from repquant_fx.recipe import EQUALIZE
from repquant_fx.recipe_settings import FLOAT

LEVELLED = "its channels share a scale with what they are multiplied by"


@dataclass
class Equalizable:
    """What cross-layer equalization may change. Labels (int32, `FIXED` for none) name channels; each has one factor
    and one shift.

    Attributes:
        rows: label of each output channel, shape (out,), by the Linear or norm that makes it.
        columns: label of each input channel, shape (in,), by the Linear that reads it.
        sites: label of each element of a site's value, by the site's name; of the value's rank, with size 1 along axes
            on which labels do not change.
        signed: (label, sign): a label's factor is that of its representative to the power of the sign, so 1 where the
            sign is 0; by label.
        shiftable: labels that may have a shift, too.
    """

    rows: dict[Node, Tensor] = field(default_factory=dict)
    columns: dict[Node, Tensor] = field(default_factory=dict)
    sites: dict[str, Tensor] = field(default_factory=dict)
    signed: dict[int, tuple[int, int]] = field(default_factory=dict)
    shiftable: set[int] = field(default_factory=set)


def find_equalizable(graph_module: GraphModule, plan: Plan, kinds: tuple[str, ...] = EQUALIZE) -> Equalizable:
    """Follow every layer's output channels to what reads them, and keep the factors that everything they meet
    allows.
    """
    matched = {group.norm for group in plan.groups}
    result, sources, start = Equalizable(), {}, 1
    for node in graph_module.graph.nodes:
        if _is_source(node) and node not in matched:
            size = shape_of(node)[-1]
            if isinstance(size, int) and not is_empty(node):
                sources[node] = torch.arange(start, start + size, dtype=torch.int32)
                start += size
    flow = ChannelFlow(graph_module, sources)
    kind_of: dict[int, str] = dict.fromkeys(flow.averaged, "values")
    unshifted: set[int] = set()
    common: set[int] = set()  # labels of keys, which may be shifted whatever their factors are
    for product in flow.products:
        keys = (
            torch.unique(product.right).tolist()
            if product.shifted and leads_to_softmax(graph_module, product.node)
            else []
        )
        common.update(keys)
        kind_of.update(
            dict.fromkeys(torch.unique(product.left).tolist() + torch.unique(product.right).tolist(), "query_key")
        )
        unshifted.update(set(torch.unique(torch.stack([product.left, product.right])).tolist()) - set(keys))
        unshifted.update(torch.unique(product.left).tolist())
    for reader in flow.readers:
        columns = reader.columns
        linear = (
            reader.node.target is aten.linear.default
            and reader.node.args[0] is reader.value
            and is_constant(reader.node.args[1])
        )
        if not linear or columns is None:
            flow.ties.fix(reader.labels)
            unshifted.update(torch.unique(reader.labels).tolist())
            continue
        result.columns[reader.node] = columns
        if not reader.shifted or reader.padded:
            unshifted.update(torch.unique(columns).tolist())
    for node, labels in sources.items():
        if len(PARAMETERS[node.target]) == 1:  # an RMS norm has no bias that could take a shift
            unshifted.update(labels.tolist())
        for label in labels.tolist():
            if kind_of.get(label, "linear") not in kinds:
                flow.ties.tie(label, FIXED)
    for labels in sources.values():
        for label in labels.tolist():
            root, sign = flow.ties.find(label)
            if root != FIXED:
                result.signed[label] = (root, sign)
            elif "keys" in kinds and label in common - unshifted:
                result.signed[label] = (FIXED, 0)
    _keep_what_is_free(result, flow, sources, plan)
    result.shiftable = set(result.signed) - unshifted
    return result


def _keep_what_is_free(result: Equalizable, flow: ChannelFlow, sources: Mapping[Node, Tensor], plan: Plan) -> None:
    """Layers and sites with at least one channel whose factor is free; the others' labels become FIXED."""
    free = torch.tensor(sorted(result.signed), dtype=torch.int32)

    def only_free(labels: Tensor) -> Tensor:
        return torch.where(torch.isin(labels, free), labels, torch.zeros_like(labels))

    result.rows = {n: only_free(labels) for n, labels in sources.items() if bool(torch.isin(labels, free).any())}
    result.columns = {
        n: only_free(labels) for n, labels in result.columns.items() if bool(torch.isin(labels, free).any())
    }
    for group in plan.groups:
        for site in group.sites:
            levelled = site.role == "plain" and site.bits != FLOAT
            pattern = flow.pattern(site.value) if levelled else None
            pattern = None if pattern is None else _without_batch(pattern, site.value)
            if pattern is not None and bool(torch.isin(pattern, free).any()):
                result.sites[site.name] = only_free(pattern)


def _without_batch(pattern: Tensor, value: Node) -> Tensor | None:
    """The pattern, cut to one period along an axis of symbolic size: a batch merged with heads repeats the heads'
    labels.

    None where the labels do not repeat, so that other sizes would have none.
    """
    for axis, size in enumerate(shape_of(value)):
        count = pattern.shape[axis]
        if isinstance(size, int) or count == 1:
            continue
        periods = [
            p
            for p in range(1, count)
            if count % p == 0
            and torch.equal(
                pattern,
                pattern.narrow(axis, 0, p).repeat([count // p if a == axis else 1 for a in range(pattern.ndim)]),
            )
        ]
        if not periods:
            return None
        pattern = pattern.narrow(axis, 0, periods[0])
    return pattern


def _is_source(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not is_float32(node):
        return False
    if node.target in NORMS:
        return len(node.args[1]) == 1 and len(node.args) > 2 and is_constant(node.args[2])  # type: ignore[arg-type]
    return node.target is aten.linear.default and is_constant(node.args[1])


def channel_rows(value: Tensor, pattern: Tensor) -> Tensor:
    """A site's value as rows of its channels, shape (rows, channels): the order of `pattern.reshape(-1)`."""
    for axis in reversed(range(value.ndim)):
        if pattern.shape[axis] not in (1, value.shape[axis]):  # a period of this axis
            value = value.unflatten(axis, (-1, pattern.shape[axis]))
            pattern = pattern.unsqueeze(axis)
    rest = [axis for axis in range(value.ndim) if pattern.shape[axis] == 1]
    channels = [axis for axis in range(value.ndim) if axis not in rest]
    return value.permute(*rest, *channels).reshape(-1, pattern.numel())


def describe(plan: Plan, equalizable: Equalizable) -> Plan:
    """A plan that says what was equalized: a norm whose channels were levelled was not left alone for want of a
    Linear.
    """
    groups = []
    for group in plan.groups:
        levelled = [site_operand(site.name) for site in group.sites if site.name in equalizable.sites]
        note = f"channels of {' and '.join(levelled)} levelled into the constants around"
        groups.append(replace(group, notes=(*group.notes, note)) if levelled else group)
    norms = {module_path(n) or n.name for n in equalizable.rows if n.target in NORMS}
    return Plan(
        tuple(groups),
        tuple(
            replace(item, reason=f"{LEVELLED}; {item.reason}") if item.path in norms else item
            for item in plan.left_alone
        ),
    )


class EqualizeLayers(Pass):
    """Weights of shape (out, in), gains of norms and biases of shape (out,) are replaced by float32 tensors of the same
    shape; computed in float64.

    Args:
        equalizable: the layers to change.
        equalization: the factors and shifts of its labels.
    """

    name = "equalize layers"
    needs = "a matched float graph"
    guarantees = "the same outputs; the channels of activations between two layers have like ranges"
    takes = gives = CANONICAL
    identity = "float"

    def __init__(self, equalizable: Equalizable, equalization: Equalization) -> None:
        super().__init__()
        self.equalizable, self.equalization = equalizable, equalization

    def run(self, graph_module: GraphModule) -> bool:
        for linear, labels in self.equalizable.columns.items():
            self._rewrite_columns(graph_module, linear, labels)
        for node, labels in self.equalizable.rows.items():
            self._rewrite_rows(graph_module, node, labels)
        return bool(self.equalizable.rows)

    def _of(self, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors and shifts, float64, shape (C,)."""
        return self.equalization.factor(labels).to(device), self.equalization.shift(labels).to(device)

    def _rewrite_rows(self, graph_module: GraphModule, node: Node, labels: Tensor) -> None:
        """`x -> (x - shift) / factor` for each output channel."""
        weight, bias = weight_and_bias(graph_module, node)
        factor, shift = self._of(labels, weight.device)
        none = bias is None and not bool(shift.any())  # a bias is gained only for a shift
        weight, bias = into_writer(weight, bias, factor, shift)
        set_parameters(graph_module, node, weight, None if none else bias)

    def _rewrite_columns(self, graph_module: GraphModule, linear: Node, labels: Tensor) -> None:
        """Undo both for each input channel."""
        weight = weight_of(graph_module, linear)
        factor, shift = self._of(labels, weight.device)
        if bool(shift.any()):
            set_parameters(graph_module, linear, *into_reader(*weight_and_bias(graph_module, linear), factor, shift))
        else:
            set_parameters(graph_module, linear, scale_input(weight, factor), None)
