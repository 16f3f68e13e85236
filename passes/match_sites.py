"""Match: find every activation and weight to quantize, and say why each norm or softmax that is not rewritten was left
alone.

A *site* is one activation value that a matrix product or convolution reads. A *group* is what is calibrated together: a
norm with all Linears that read it, the two operands of a MatMul, the Linears that share an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from repquant_fx import naming
from repquant_fx.naming import Names
from repquant_fx.passes.base import LeftAlone, Made, Pass, aten, is_constant, is_tensor, module_path, shape_of
from repquant_fx.passes.channel_flow import ChannelFlow, describe_reader, is_empty, origin
from repquant_fx.passes.operators import AFFINE, CONVOLUTIONS, MATMULS, NORMS, OTHER_NORMS, PRODUCTS, SIZED, SOFTMAX
from repquant_fx.passes.spec import CANONICAL
from repquant_fx.recipe import LayerPlan, Recipe


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Site:
    """One quantized activation, as matched.

    Attributes:
        name: unique; module path and operand, e.g. `blocks.0.attn/probabilities`.
        role: `norm` (per channel while calibrating), `softmax` (logarithmic) or `plain` (uniform, per tensor).
        value: the node that produces it in the matched graph; later passes may put others between it and the site's
            slot.
        consumers: the nodes that read it.
        bits: `FLOAT` where it stays in float.
    """

    name: str
    role: str
    value: Node
    consumers: tuple[Node, ...]
    bits: int


@dataclass(frozen=True, eq=False)
class Group:
    """What is calibrated together, as matched.

    Attributes:
        kind: `norm_linear`, `affine_linear`, `linear`, `conv` or `matmul`.
        path: module path of the first consumer (of the norm where there is one).
        norm, softmax: the node that is rewritten, where there is one; a factor and shift per channel counts as a norm.
        shared_norm: the norm has readers besides these Linears, which must keep seeing its original values.
        padded: zeros are put in between the norm and a Linear, so the shift must be added after them.
        plans: effective settings of each consumer.
        notes: what the report says about it, as sentences.
    """

    kind: str
    path: str
    sites: tuple[Site, ...]
    consumers: tuple[Node, ...]
    plans: Mapping[Node, LayerPlan]
    norm: Node | None = None
    softmax: Node | None = None
    shared_norm: bool = False
    padded: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The result of matching: groups in graph order, and what is in none."""

    groups: tuple[Group, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()


class MatchSites(Pass[Plan]):
    """Makes the plan: sites are float32 values of any shape that Linears (weight (out, in)), convolutions and MatMuls
    read; channels are the last axis behind a norm.
    """

    name = "match sites"
    needs = "a canonical graph with tensor metadata"
    guarantees = "every norm and softmax is in a group or has a reason; the graph is unchanged"
    takes = gives = CANONICAL

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def run(self, graph_module: GraphModule) -> Made[Plan]:
        return Made(False, _Matching(graph_module, self.recipe).plan())


class _Matching:
    """The matching of one graph: what was matched so far, and what all matchers ask."""

    def __init__(self, graph_module: GraphModule, recipe: Recipe) -> None:
        self.graph_module, self.recipe = graph_module, recipe
        self._groups: list[Group] = []
        self._left_alone: list[LeftAlone] = []
        self._left: set[Node] = set()
        self._names = Names()
        self._live, self._read = data_dependent(graph_module), read_for_values(graph_module)

    def plan(self) -> Plan:
        """All groups in graph order, and what is in none."""
        claimed: dict[Node, Group] = {}
        nodes = list(self.graph_module.graph.nodes)
        for node in nodes:
            if node.op == "call_function" and (node.target in NORMS or node.target is AFFINE):
                self._match_norm(node, claimed)
            elif node.op == "call_function" and node.target in OTHER_NORMS:
                self._leave(
                    node,
                    "it normalises over more than the channel axis, so no per-channel affine follows from it alone",
                )
        by_value: dict[Node, list[Node]] = {}
        for node in nodes:
            if node.op != "call_function" or node in claimed:
                continue
            if node not in self._read:
                if node.target in PRODUCTS:
                    self._leave(node, "nothing reads more of its result than its size")
            elif node.target in PRODUCTS and (reason := _unsuitable(node, *node.args[:2])):
                self._leave(node, reason)
            elif node.target is aten.linear.default and is_constant(node.args[1]) and is_tensor(node.args[0]):
                by_value.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
            elif node.target in CONVOLUTIONS and is_constant(node.args[1]):
                by_value.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
            elif node.target in MATMULS and node in self._live:
                self._match_matmul(node)
        for value, consumers in by_value.items():
            alike: dict[object, list[Node]] = {}
            for consumer in consumers:
                in_float = self.recipe.layer(module_path(consumer)).weight_only
                alike.setdefault((_geometry(consumer), in_float), []).append(consumer)
            for chosen in alike.values():
                self._match_weighted(value, chosen, "conv" if chosen[0].target in CONVOLUTIONS else "linear")
        matched = {group.softmax for group in self._groups}
        for node in nodes:
            if node.op == "call_function" and node.target in SOFTMAX and node not in matched and node not in self._left:
                self._leave(node, "its result is not an operand of a matrix product")
        order = {node: index for index, node in enumerate(nodes)}
        groups = sorted(self._groups, key=lambda g: min(order[c] for c in g.consumers))
        return Plan(tuple(groups), tuple(self._left_alone))

    def _match_norm(self, norm: Node, claimed: dict[Node, Group]) -> None:
        if norm.target in NORMS and len(norm.args[1]) != 1:  # type: ignore[arg-type]
            axes = len(norm.args[1])  # type: ignore[arg-type]
            self._leave(norm, f"it normalises over {axes} axes, not over channels alone")
            return
        size = shape_of(norm)[-1]
        if not isinstance(size, int):
            self._leave(norm, "its number of channels is not fixed")
            return
        if reason := _unsuitable(norm, norm.args[0]):
            self._leave(norm, reason)
            return
        channels = torch.arange(1, size + 1, dtype=torch.int32)
        flow = ChannelFlow(self.graph_module, {norm: channels}, affine=True)
        readers = [r for r in flow.readers if r.node.target is aten.linear.default and is_constant(r.node.args[1])
                   and r.node.args[0] is r.value and r.columns is not None and torch.equal(r.columns, channels)
                   and not is_empty(r.node) and r.node in self._read]
        plans = {r.node: self.recipe.layer(module_path(r.node)) for r in readers}
        readers = [r for r in readers if not plans[r.node].skip and not plans[r.node].weight_only]
        if not readers:
            if plans:
                verb = "skips" if all(plan.skip for plan in plans.values()) else "keeps in float what goes to"
                self._leave_as_asked(norm, f"the recipe {verb} every Linear that reads it")
                return
            why = "; ".join(dict.fromkeys(r.reason for r in flow.readers if r.reason))
            read_by = ", ".join(dict.fromkeys(describe_reader(r) for r in flow.readers if not r.reason))
            self._leave(norm, "no Linear reads it through operators that keep channels apart"
                        + (f": read by {read_by}" if read_by else "") + (f" ({why})" if why else ""))
            return
        path = module_path(norm) or norm.name
        values: dict[Node, list[Node]] = {}
        for reader in readers:
            values.setdefault(reader.value, []).append(reader.node)
        bits = max(plans[r.node].abits for r in readers)  # one scale serves them all
        sites = tuple(
            self._site(naming.site(module_path(consumers[0]) or path, "input"), "norm", value, consumers, bits)
            for value, consumers in values.items()
        )
        consumers = tuple(r.node for r in readers)
        others = [r for r in flow.readers if r.node not in consumers]
        padded, notes = any(r.padded for r in readers), []
        if others:
            notes.append("also read by " + ", ".join(dict.fromkeys(describe_reader(r) for r in others))
                         + ": these keep the original norm")
        if padded:
            notes.append("zeros are padded in after the norm: its shift is added after them")
        group = Group(
            "affine_linear" if norm.target is AFFINE else "norm_linear",
            path,
            sites,
            consumers,
            {c: plans[c] for c in consumers},
            norm=norm,
            shared_norm=bool(others),
            padded=padded,
            notes=tuple(notes),
        )
        self._groups.append(group)
        for consumer in consumers:
            claimed[consumer] = group

    def _match_matmul(self, node: Node) -> None:
        path = module_path(node) or node.name
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(operands) != 2 or not all(is_tensor(o) for o in operands):
            return
        plan = self.recipe.layer(path)
        sources = [origin(o) for o in operands]
        softmax = next((s for s in sources if s.op == "call_function" and s.target in SOFTMAX), None)
        if plan.skip:
            if softmax is not None:
                self._leave(softmax, "the recipe skips the product that reads it")
            return
        if plan.weight_only:
            if softmax is not None:
                self._leave_as_asked(softmax, "the recipe leaves the operands of the product that reads it in float")
            return
        feeds_softmax = any(_reaches_softmax(user) for user in node.users)
        labels = ["query", "key"] if feeds_softmax and softmax is None else ["left", "right"]
        sites = []
        for operand, source, label in zip(operands, sources, labels):
            is_softmax = source is softmax and softmax is not None
            if softmax is not None:
                label = "probabilities" if is_softmax else "value"
            role = "softmax" if is_softmax and self.recipe.softmax != "uniform" else "plain"
            sites.append(self._site(naming.site(path, label), role, operand, [node], plan.abits))
        self._groups.append(Group("matmul", path, tuple(sites), (node,), {node: plan}, softmax=softmax))

    def _match_weighted(self, value: Node, consumers: list[Node], kind: str) -> None:
        plans = {c: self.recipe.layer(module_path(c)) for c in consumers}
        consumers = [c for c in consumers if not plans[c].skip]
        if not consumers:
            return
        path = module_path(consumers[0]) or consumers[0].name
        from_input = origin(value).op == "placeholder"
        bits = (
            self.recipe.input_bits
            if from_input and not self.recipe.weight_only and not self._overridden(path)
            else max(plans[c].abits for c in consumers)
        )
        site = self._site(naming.site(path, "input"), "plain", value, consumers, bits)
        self._groups.append(Group(kind, path, (site,), tuple(consumers), {c: plans[c] for c in consumers}))

    def _overridden(self, path: str) -> bool:
        import fnmatch

        return any(rule.abits is not None and fnmatch.fnmatchcase(path, rule.match) for rule in self.recipe.layers)

    def _site(self, name: str, role: str, value: Node, consumers: Sequence[Node], bits: int) -> Site:
        return Site(self._names.unique(name), role, value, tuple(consumers), bits)

    def _leave_as_asked(self, node: Node, reason: str) -> None:
        """A reason is worth a line where the recipe quantizes activations elsewhere."""
        self._left.add(node)
        if not self.recipe.weight_only:
            self._leave(node, reason)

    def _leave(self, node: Node, reason: str) -> None:
        self._left.add(node)
        self._left_alone.append(
            LeftAlone(module_path(node) or node.name, str(node.target).split(".")[1], reason, MatchSites.name)
        )


def _geometry(consumer: Node) -> object:
    """What layers that read one value must have in common to share a site: convolutions see the same patches of it."""
    if consumer.target not in CONVOLUTIONS:
        return None
    return consumer.target, tuple(shape_of(consumer.args[1])[1:]), str(consumer.args[3:])  # type: ignore[arg-type]


def _unsuitable(*values: object) -> str | None:
    """Why these tensors cannot be quantized, None where they can."""
    if any(is_empty(value) for value in values):
        return "it has no elements"
    kinds = {value.meta["val"].dtype for value in values if is_tensor(value)}  # type: ignore[attr-defined]
    return (
        None
        if kinds <= {torch.float32}
        else f"it computes in {', '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}, not float32"
    )


def data_dependent(graph_module: GraphModule) -> set[Node]:
    """Nodes whose values depend on the data of the model's floating-point computation, not on sizes or positions
    alone.
    """
    live: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
        elif node.op == "call_function" and node.target is not aten.sym_size.int:
            if any(parent in live for parent in node.all_input_nodes):
                live.add(node)
    return live


def read_for_values(graph_module: GraphModule) -> set[Node]:
    """Nodes that an output is computed from; what is read for its size alone is not among them: no file holds it."""
    read: set[Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if node.op == "output" or node in read:
            sized = SIZED.get(node.target)
            read.update(_nodes(a for i, a in enumerate((*node.args, *node.kwargs.values())) if i != sized))
    return read


def _nodes(arguments: Iterable[Argument]) -> list[Node]:
    found: list[Node] = []
    map_arg(tuple(arguments), found.append)
    return found


def _reaches_softmax(node: Node, depth: int = 12) -> bool:
    """Whether attention logits lead to a softmax within a few elementwise or layout operators."""
    if depth == 0 or node.op != "call_function":
        return False
    if node.target in SOFTMAX:
        return True
    if node.target in MATMULS or node.target is aten.linear.default:
        return False
    return any(_reaches_softmax(user, depth - 1) for user in node.users)

