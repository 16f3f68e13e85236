"""The small shared base of all passes, on torch.fx.passes.infra."""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from repquant_fx import naming
from repquant_fx.errors import PassError, RepQuantError
from repquant_fx.passes import identity
from repquant_fx.passes.identity import Probe
from repquant_fx.torch_private import version

if TYPE_CHECKING:
    from repquant_fx.passes.spec import Stage

aten = torch.ops.aten
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's key for nodes that no module made
HISTORY = "repquant_fx.passes"  # key of a graph module's meta: names of the passes that ran on it, in order
LEFT_ALONE = "repquant_fx.left_alone"  # and what they left alone


@dataclass(frozen=True)
class LeftAlone:
    """What a pass could have rewritten and did not.

    Attributes:
        path: of the module, or the node's name where it has none.
        operator: such as `softmax`.
        reason: in words, for the report.
        by: name of the pass.
    """

    path: str
    operator: str
    reason: str
    by: str = ""


T = TypeVar("T")


@dataclass(frozen=True)
class Made(Generic[T]):
    """What a pass returns that hands on more than the graph: whether it changed anything, and what it made."""

    modified: bool
    value: T


class Outcome(PassResult):
    """A `PassResult` with what the pass `made`, None for most."""

    made: Any = None


class Pass(PassBase, Generic[T]):
    """One rewriting of a graph. Subclasses set `name`, `needs` and `guarantees` (one sentence each) and define `run`.

    The graph given still runs afterwards: `run` edits it in place and returns whether it changed anything, or
    that and what it `Made`; what it left alone it says with `leave`. `requires` and `ensures` are the contract as code.

    Attributes:
        takes, gives: the stage (see `spec`) of the graph before and after. It is checked where the two differ, and for
            every pass while debugging.
        identity: "float" where the float model stays what it was; it is checked where there is a probe.
        left_alone: of the last call.
    """

    name = "pass"
    needs = ""
    guarantees = ""
    takes: Stage | None = None
    gives: Stage | None = None
    identity: Literal["", "float"] = ""

    def __init__(self) -> None:
        self.left_alone: list[LeftAlone] = []

    def run(self, graph_module: GraphModule) -> bool | Made[T]:
        raise NotImplementedError

    def requires(self, graph_module: GraphModule) -> None:
        if self.takes is not None and (self.takes is not self.gives or debugging()):
            self.takes.check(graph_module)

    def ensures(self, graph_module: GraphModule) -> None:
        if self.gives is not None and (self.takes is not self.gives or debugging()):
            self.gives.check(graph_module)

    def leave(self, node: Node, reason: str) -> None:
        """Say why something was left as it is."""
        operator = str(node.target).split(".")[1] if "." in str(node.target) else node.op
        record = LeftAlone(module_path(node) or node.name, operator, reason, self.name)
        if record not in self.left_alone:
            self.left_alone.append(record)

    def call(self, graph_module: GraphModule) -> Outcome:
        self.left_alone = []
        before = _Snapshot(graph_module) if debugging() else None
        returned = self.run(graph_module)
        modified = returned.modified if isinstance(returned, Made) else returned
        if before is not None and before.same(graph_module) == modified:
            raise PassError(f"it returned {modified} and {'changed nothing' if modified else 'changed the graph'}")
        if modified:
            graph_module.graph.eliminate_dead_code()  # lints first
            recompile_when_called(graph_module)
        outcome = Outcome(graph_module, modified)
        outcome.made = returned.value if isinstance(returned, Made) else None
        return outcome


def run_pass(graph_module: GraphModule, each: Pass[T], probe: Probe | None = None) -> T:
    """Run one pass that makes something, and give what it made. Arguments and errors are those of `run_passes`."""
    return _run(graph_module, each, _Watch(probe)).made


def run_passes(graph_module: GraphModule, passes: Sequence[Pass[Any]], probe: Probe | None = None) -> GraphModule:
    """Run passes in order.

    Args:
        probe: computes what a pass that claims a float identity must leave as it is; without one that is not checked.

    Raises:
        PassError: a pass failed, broke its contract or an identity it claims; the message names it and all passes that
            ran before it on this graph.
    """
    watch = _Watch(probe)
    for each in passes:
        graph_module = _run(graph_module, each, watch).graph_module
    return graph_module


def _run(graph_module: GraphModule, each: Pass[Any], watch: _Watch) -> Outcome:
    watch.before(graph_module, each)
    try:
        outcome = each(graph_module)
        assert isinstance(outcome, Outcome)
        if outcome.modified:
            watch.after(outcome.graph_module, each)
    except Exception as error:
        if isinstance(error, RepQuantError) and not isinstance(error, PassError):
            raise
        what = str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
        raise PassError(f"pass {each.name!r} failed after {_history(graph_module)}: {what}") from error
    meta = outcome.graph_module.meta
    meta[HISTORY] = (*meta.get(HISTORY, ()), each.name)
    meta[LEFT_ALONE] = tuple(dict.fromkeys((*left_alone(outcome.graph_module), *each.left_alone)))
    return outcome


class _Watch:
    """A probe, and what it gave last: what one pass leaves is what the next one finds."""

    def __init__(self, probe: Probe | None) -> None:
        self.probe = probe
        self.values: Mapping[str, Any] | None = None

    def before(self, graph_module: GraphModule, each: Pass[Any]) -> None:
        if self.probe is not None and each.identity and self.values is None:
            self.values = self.probe(graph_module)

    def after(self, graph_module: GraphModule, each: Pass[Any]) -> None:
        """
        Raises:
            PassError: the pass claims an identity and broke it.
        """
        before, self.values = self.values, None
        if self.probe is not None and each.identity and before is not None:
            self.values = self.probe(graph_module)
            identity.check(before, self.values, partial(self.probe.shaken, graph_module))


def left_alone(graph_module: GraphModule) -> tuple[LeftAlone, ...]:
    """What the passes that `run_passes` ran on a graph left alone, in order."""
    found: tuple[LeftAlone, ...] = graph_module.meta.get(LEFT_ALONE, ())
    return found


def debugging() -> bool:
    """Whether contracts that cost time are checked too: the environment variable REPQUANT_FX_DEBUG is set and not 0."""
    return os.environ.get("REPQUANT_FX_DEBUG", "0") not in ("", "0")


def recompile_when_called(graph_module: GraphModule) -> None:
    """Bring `forward` up to date with the graph at the next call.

    Most passes are followed by another one: writing Python for the whole graph after each would take time that grows
    with the square of the number of layers.
    """
    def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()  # replaces this function
        return self.forward(*args, **kwargs)

    type(graph_module).forward = forward  # every GraphModule has a class of its own


def _history(graph_module: GraphModule) -> str:
    """All passes that ran on a graph, each once with how often it ran, in the order of their first run."""
    counts = Counter(graph_module.meta.get(HISTORY, ()))
    names = [name if times == 1 else f"{name} ({times} times)" for name, times in counts.items()]
    return ", ".join(names) or "no other pass"


class _Snapshot:
    """A graph's code, and which tensors and modules it has: kept to tell whether a pass changed anything."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.nodes = [(n, n.op, n.target, n.args, n.kwargs) for n in graph_module.graph.nodes]
        self.modules = dict(graph_module.named_modules())
        tensors = itertools.chain(graph_module.named_parameters(remove_duplicate=False),
                                  graph_module.named_buffers(remove_duplicate=False))
        self.tensors = {name: (tensor, version(tensor)) for name, tensor in tensors}

    def same(self, graph_module: GraphModule) -> bool:
        now = _Snapshot(graph_module)
        if self.modules.keys() != now.modules.keys() or self.tensors.keys() != now.tensors.keys():
            return False
        modules = all(module is now.modules[name] for name, module in self.modules.items())
        tensors = all(tensor is now.tensors[name][0] and written == now.tensors[name][1]
                      for name, (tensor, written) in self.tensors.items())
        return self.nodes == now.nodes and modules and tensors


def module_path(node: Node) -> str:
    """Path of the module that made `node`, '' for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [value for key, value in stack.items() if key != NO_MODULE]
    if not entries:
        return ""
    path = entries[-1][0] if isinstance(entries[-1], tuple) else str(entries[-1])
    # export writes list indices of some paths as attribute calls; keep the dotted form that users know
    path = path.replace("L['self'].", "").replace("L['self']", "")
    return path.split("@")[0]


def shape_of(node: Node) -> list[int | torch.SymInt]:
    """Shape of a tensor-valued node; symbolic where dynamic."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise PassError(f"node {node.name} has no tensor metadata")
    return list(value.shape)


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def attribute(graph_module: GraphModule, node: Node) -> Tensor:
    """The tensor a get_attr node reads."""
    owner: object = graph_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    if not isinstance(owner, Tensor):
        raise PassError(f"{node.target} is not a tensor")
    return owner


def dtypes_of(node: Node) -> set[torch.dtype | None]:
    """Of the tensors that a node gives; None for what is no tensor."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return {each.dtype if isinstance(each, Tensor) else None for each in values}


def is_float32(node: Node) -> bool:
    """Whether what a node gives is float32, all of it."""
    return dtypes_of(node) <= {torch.float32}


def is_constant(node: object) -> bool:
    """Whether an argument is a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def add_tensor(graph_module: GraphModule, target: str, value: Tensor) -> str:
    """Register a buffer at a dotted path, creating modules on the way; returns the path, made unique if taken."""
    owner, path, leaf = _place(graph_module, target)
    name = naming.unique(leaf, lambda candidate: hasattr(owner, candidate))
    owner.register_buffer(name, value.detach().clone())
    return path + name


def free_stem(graph_module: GraphModule, stem: str) -> str:
    """`stem`, numbered where something is called as one of its derived names already (see `naming`)."""
    owner, path, leaf = _place(graph_module, stem)
    return path + naming.unique(leaf, lambda name: any(hasattr(owner, suffix.of(name)) for suffix in naming.DERIVED))


def _place(graph_module: GraphModule, target: str) -> tuple[nn.Module, str, str]:
    """The module that holds a dotted path, made where there is none, its path with a dot behind it, and the last part.

    A part that is called like a tensor or a method is numbered.
    """
    *parents, leaf = target.split(".")
    owner: nn.Module = graph_module
    for index, part in enumerate(parents):
        parents[index] = name = naming.unique(part, partial(_no_module, owner))
        if not hasattr(owner, name):
            owner.add_module(name, nn.Module())
        owner = getattr(owner, name)
    return owner, "".join(f"{part}." for part in parents), leaf


def _no_module(owner: nn.Module, name: str) -> bool:
    """Whether an attribute exists and is no module."""
    return not isinstance(getattr(owner, name, owner), nn.Module)


def constant_node(graph_module: GraphModule, target: str, value: Tensor, before: Node) -> Node:
    """A get_attr node, inserted before `before`, that reads a new buffer named after `target`."""
    path = add_tensor(graph_module, target, value)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(path)
    node.meta["val"] = value
    return node


def replace_constant(graph_module: GraphModule, user: Node, index: int, value: Tensor, fallback_name: str) -> Node:
    """Give argument `index` of `user` a new constant value without touching any other reader of the old one.

    The old name is kept where `user` was its only reader, so that files keep the names people know.
    """
    old = user.args[index] if index < len(user.args) else None
    name = str(old.target) if isinstance(old, Node) and old.op == "get_attr" else fallback_name
    if isinstance(old, Node) and old.op == "get_attr" and len(old.users) == 1:
        _forget(graph_module, old)
    node = constant_node(graph_module, name, value, user)
    args = list(user.args) + [None] * (index + 1 - len(user.args))
    args[index] = node
    user.args = tuple(args)
    if isinstance(old, Node) and not old.users:
        graph_module.graph.erase_node(old)
    return node


def drop_constant(graph_module: GraphModule, node: Node) -> None:
    """Erase a get_attr node that nothing reads any more, and its tensor where no other node reads that."""
    if node.op == "get_attr" and not node.users:
        _forget(graph_module, node)
        node.graph.erase_node(node)


def _forget(graph_module: GraphModule, node: Node) -> None:
    """Unregister the tensor of a get_attr node, unless another node reads it."""
    if sum(n.op == "get_attr" and n.target == node.target for n in graph_module.graph.nodes) == 1:
        *parents, leaf = str(node.target).split(".")
        delattr(graph_module.get_submodule(".".join(parents)), leaf)


def shared_copy(graph_module: GraphModule) -> GraphModule:
    """A copy with its own graph and attributes but the same tensors: passes replace constants and never write into
    them.
    """
    memo: dict[int, Any] = {id(t): t for t in [*graph_module.parameters(), *graph_module.buffers()]}
    return copy.deepcopy(graph_module, memo)


def own_tensors(graph_module: GraphModule) -> None:
    """Give a graph its own copies of all tensors."""
    for module in graph_module.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.detach().clone())


def copy_meta(source: Node, target: Node, value: Tensor | None = None) -> Node:
    """Give a new node the module path of the node it derives from."""
    if "nn_module_stack" in source.meta:
        target.meta["nn_module_stack"] = source.meta["nn_module_stack"]
    if value is not None:
        target.meta["val"] = value
    return target
