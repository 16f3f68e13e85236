"""Capture: a module or an ExportedProgram becomes an ATen-level GraphModule in which attention is MatMul, Softmax,
MatMul.

torch.export keeps norms, linears, convolutions and softmax whole; only scaled_dot_product_attention is decomposed (see
`attention`). Long because what export leaves undone is mended in one place.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import keyword
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from repquant_fx import limits
from repquant_fx.errors import CaptureError, ExportError, RepQuantWarning
from repquant_fx.frontends.attention import VisibleAttention, decomposed
from repquant_fx.torch_private import EXPORT_LOGGERS, pytree, suggested_shapes

_TYPES = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool}
AXES = "dynamic_axes"  # in the meta of an input: axis to name


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph_module: ATen-level; owns its parameters (the caller's model is never mutated).
        input_names: names of the forward arguments, in order; the graph takes them by position.
        output_names: one per output tensor (see `name_outputs`); the graph gives a flat tuple, or the one tensor.
        eager_difference: largest absolute difference between the graph's and the model's outputs on the example inputs,
            divided by the largest absolute output.
        dynamic_batch: whether the batch dimension is symbolic.
    """

    graph_module: GraphModule
    input_names: list[str]
    output_names: list[str]
    eager_difference: float
    dynamic_batch: bool


def capture(
    module: nn.Module | torch.export.ExportedProgram, example_inputs: Sequence[Tensor], *, dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None, dynamic_axes: Sequence[Mapping[int, str]] | None = None,
    outputs: Sequence[str] | None = None, least: Mapping[str, int] | None = None,
) -> Captured:
    """Capture a model and check the graph against it. Long because it says what every argument is.

    Args:
        module: a module (put in eval mode, not mutated), or an ExportedProgram.
        example_inputs: one tensor per input; an axis must be at least 2 long to become dynamic.
        dynamic_batch: make dimension 0 of every input symbolic. Falls back to static, with a warning, where the model
            does not allow it.
        input_names: keyword names under which the example inputs are passed to the module; by position where None.
        dynamic_axes: for each input, axis to name (`batch`, `sequence`); axes of one name have one size. The batch
            alone where None. Falls back, with a warning, to the batch alone and then to none. An ExportedProgram keeps
            its own.
        outputs: the outputs to keep, by name (`logits`) or prefix (`hidden_states` for all of them); all where None.
        least: the smallest sizes that axes are traced for, by name. Where given, all of `dynamic_axes` must be free:
            there is nothing to fall back on.

    Raises:
        CaptureError: control flow that depends on values, unsupported inputs, an unknown output, or a graph that does
            not equal the model.
        InputError: a result on the way that this machine cannot hold.
    """
    inputs = distinct(example_inputs)
    eager: nn.Module
    if isinstance(module, torch.export.ExportedProgram):
        try:
            program, eager = module, module.module(check_guards=False)
            args, kwargs = _call_arguments(program, inputs)
        except Exception as error:
            raise CaptureError(f"the program is not whole: {_first_line(error)}") from error
    else:
        eager = module.eval()
        args, kwargs = (inputs, {}) if input_names is None else ((), dict(zip(input_names, inputs, strict=True)))
        wanted = _wanted_axes(inputs, dynamic_axes, dynamic_batch)
        program, axes = _export(eager, args, kwargs, wanted if least is None else wanted[:1], least or {})
        limits.check_results(program.graph, "the model")  # nothing has computed yet
    _check_names(program)
    try:
        unlifted = decomposed(program)
    except Exception as error:
        raise CaptureError(f"cannot decompose the attention of the captured model: {_first_line(error)}") from error
    # its own graph, but the caller's tensors: passes replace constants and never write into them
    tensors = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in unlifted.parameters()} | {
        id(b): b for b in unlifted.buffers()
    }
    graph_module = cast(GraphModule, copy.deepcopy(unlifted, cast(Any, tensors)))
    names = _keep_nothing_but_the_graph(graph_module, input_names)
    if isinstance(module, torch.export.ExportedProgram):
        axes = _symbolic_axes(graph_module)
        given = dict(zip([str(n.target) for n in _placeholders(cast(GraphModule, unlifted))], inputs))
        inputs = tuple(given[name] for name in names)
    for node, named in zip(_placeholders(graph_module), axes, strict=True):
        node.meta[AXES] = dict(named)
    try:
        with torch.no_grad(), VisibleAttention():
            result = eager(*(a.clone() for a in args), **{k: a.clone() for k, a in kwargs.items()})
    except Exception as error:
        raise CaptureError(
            f"the model does not run on its example inputs: {_first_line(error)}{_user_line(error)}"
        ) from error
    expected, labels = tensors_in(result), name_outputs(result)
    if outputs is not None:
        kept = _select(labels, outputs)
        _keep_outputs(graph_module, kept)
        expected, labels = [expected[i] for i in kept], [labels[i] for i in kept]
    _check_types(dict(zip(names, inputs)), "input")
    _check_types(dict(zip(labels, expected)), "output")
    difference = _check_equal(graph_module, inputs, expected)
    return Captured(graph_module, names, labels, difference, any(0 in named for named in axes))


def distinct(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs, with a copy of each that stands among them before: torch traces one tensor as one input."""
    return tuple(t.clone() if any(t is other for other in inputs[:i]) else t for i, t in enumerate(inputs))


def _check_equal(graph_module: GraphModule, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of the graph's outputs from the model's.

    Raises:
        CaptureError: it is beyond float rounding, or the graph does not run.
    """
    try:
        with torch.no_grad():
            outputs = tensors_in(graph_module(*inputs))
    except Exception as error:
        raise CaptureError(f"the captured graph does not run on the example inputs: {_first_line(error)}") from error
    if len(outputs) != len(expected):
        raise CaptureError(f"the captured graph gives {len(outputs)} tensors where the model gives {len(expected)}: it "
                           "may return one that it writes into")
    difference = max((_difference(e, o) for e, o in zip(expected, outputs, strict=True)), default=0.0)
    if not difference < 1e-3:
        raise CaptureError(f"the captured graph does not equal the model: relative difference {difference:.3g}; "
                           "the model may be in training mode, draw random numbers or depend on input values")
    return difference


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of a model's output, flattened in order."""
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def name_outputs(result: Any) -> list[str]:
    """Names of `tensors_in(result)`: field names and keys joined by dots, numbers for the items of a sequence.

    One tensor is `output`; the items of a plain tuple `output_0`, `output_1`.
    """
    named: dict[int, list[str]] = {}

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Tensor):
            named.setdefault(id(value), []).append(".".join(path))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, (*path, str(key)))
        elif dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
            keys = getattr(value, "_fields", None) or [f.name for f in dataclasses.fields(value)]
            for key in keys:
                visit(getattr(value, key), (*path, key))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(item, (*path, str(index)) if path else (f"output_{index}",))

    tensors = tensors_in(result)
    if len(tensors) == 1 and isinstance(result, (Tensor, list, tuple)) and not hasattr(result, "_fields"):
        return ["output"]
    visit(result, ())
    return [named[id(t)].pop(0) if named.get(id(t)) else f"output_{i}" for i, t in enumerate(tensors)]


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value; of numbers that are not floating point, 0 or infinity."""
    if expected.shape != found.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else math.inf
    if not expected.numel() or torch.equal(expected, found):
        return 0.0
    alike = (expected == found) | (expected.isnan() & found.isnan())  # infinities too
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).max().clamp(min=1e-12)
    return float((torch.where(alike, 0.0, (expected - found).abs()) / largest).max())


Axes = tuple[Mapping[int, str], ...]


def _wanted_axes(
    inputs: Sequence[Tensor], dynamic_axes: Sequence[Mapping[int, str]] | None, dynamic_batch: bool
) -> list[Axes]:
    """What to try, most dynamic first, nothing dynamic last."""
    attempts: list[Axes] = []
    if dynamic_axes is not None:
        wanted = [
            {axis % t.ndim: name for axis, name in named.items()} for t, named in zip(inputs, dynamic_axes, strict=True)
        ]
        short = {named[axis] for t, named in zip(inputs, wanted) for axis in named if t.shape[axis] < 2}
        if not dynamic_batch:
            short |= {named[0] for named in wanted if 0 in named}
        wanted = [{axis: name for axis, name in named.items() if name not in short} for named in wanted]
        attempts += [tuple(wanted), tuple({a: n for a, n in named.items() if a == 0} for named in wanted)]
    elif dynamic_batch and all(t.ndim and t.shape[0] >= 2 for t in inputs):
        attempts.append(tuple({0: "batch"} for _ in inputs))
    attempts.append(tuple({} for _ in inputs))
    return list({tuple(tuple(sorted(named.items())) for named in axes): axes for axes in attempts}.values())


def _export(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], attempts: Sequence[Axes],
            least: Mapping[str, int]) -> tuple[torch.export.ExportedProgram, Axes]:
    problem: Exception | None = None
    for axes in attempts:
        dims = {name: torch.export.Dim(name, min=least.get(name, 1)) for named in axes for name in named.values()}
        shapes = _per_parameter(module, list(kwargs), [{axis: dims[n] for axis, n in named.items()} for named in axes])
        try:
            program = _export_once(module, args, kwargs, shapes if dims else None)
        except Exception as error:
            problem = problem or error
            continue
        if problem is not None:
            missing = sorted({n for named in attempts[0] for n in named.values()} - set(dims))
            kept = (
                f"with a dynamic {', '.join(sorted(dims))} only"
                if dims
                else f"with batch {next(iter([*args, *kwargs.values()])).shape[0]}"
            )
            warnings.warn(
                f"the model does not allow a dynamic {', '.join(missing)}; captured {kept} ({_first_line(problem)})",
                RepQuantWarning,
                stacklevel=3,
            )
        return program, axes
    assert problem is not None
    raise ExportError(f"torch.export cannot capture the model: {_first_line(problem)}{_user_line(problem)}. "
                       "Control flow that depends on tensor values must become torch.where or torch.cond") from problem


def _export_once(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], shapes: Any
) -> torch.export.ExportedProgram:
    """Export; once more with the bounds that torch asks for, such as the number of positions that are embedded."""
    for last in (False, True):
        try:
            with warnings.catch_warnings(), torch.no_grad(), quiet_torch(), _layers_in_parts():
                warnings.simplefilter("ignore")
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            refined = None if last else suggested_shapes(error, shapes)
            if refined is None or any(isinstance(leaf, int) for leaf in pytree.tree_leaves(refined)):
                raise  # a dimension that torch wants constant is not dynamic
            shapes = refined
    raise AssertionError


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back what torch logs and prints during an export: a failure repeats in many lines what the error says."""
    loggers = [logging.getLogger(name) for name in EXPORT_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _layers_in_parts() -> Iterator[None]:
    """Keep torch's own encoder layer from running as the one operator that it has for inference: nothing in it could be
    quantized.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _per_parameter(module: nn.Module, names: Sequence[str], shapes: Sequence[Mapping[int, Any]]) -> object:
    """dynamic_shapes in the form export expects: by parameter name, or one per position, those that `*args` takes
    together.
    """
    parameters = inspect.signature(module.forward).parameters
    for name in names:
        if name not in parameters:
            raise CaptureError(
                f"{type(module).__name__} takes no input called {name!r}; it takes {', '.join(parameters)}"
            )
    if names:
        return dict(zip(names, shapes, strict=True))
    first = next(iter(parameters.values()), None)
    return (tuple(shapes),) if first is not None and first.kind == inspect.Parameter.VAR_POSITIONAL else tuple(shapes)


def _call_arguments(
    program: torch.export.ExportedProgram, inputs: tuple[Tensor, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a program, from its inputs in flat order."""
    spec = program.call_spec.in_spec
    if spec is None or spec.num_leaves != len(inputs):
        return inputs, {}
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    return tuple(args), dict(kwargs)


def _placeholders(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _symbolic_axes(graph_module: GraphModule) -> Axes:
    """Names for the symbolic axes of a graph's inputs: `batch` for the first input's first axis, numbers for others."""
    names: dict[str, str] = {}
    found = []
    for node in _placeholders(graph_module):
        named = {}
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int):
                label = "batch" if axis == 0 and "batch" not in names.values() else f"size_{len(names)}"
                named[axis] = names.setdefault(str(size), label)
        found.append(named)
    return tuple(found)


def _keep_nothing_but_the_graph(graph_module: GraphModule, order: Sequence[str] | None) -> list[str]:
    """Make it a plain function of tensors in the given order (unlift leaves input guards and pytree hooks behind).

    Returns:
        the names of the inputs.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and "guard" in str(node.target):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.copy_.default and cast(Node, node.args[0]).op == "placeholder":
            node.replace_all_uses_with(cast(Node, node.args[1]))  # a file writes into no input
            graph.erase_node(node)
        elif node.op == "output":
            kept = [
                n
                for n in pytree.tree_leaves(node.args)
                if isinstance(n, Node) and isinstance(n.meta.get("val"), Tensor)
            ]
            node.args = (kept[0] if len(kept) == 1 else tuple(kept),)
    _drop_dead(graph)
    graph.set_codegen(CodeGen())
    placeholders = {str(node.target): node for node in _placeholders(graph_module)}
    names = list(placeholders)
    if order is not None and set(order) == set(names):
        names = list(order)
        first = next(iter(graph.nodes))
        for name in names:
            first.prepend(placeholders[name])
    graph_module.recompile()
    return names


def _drop_dead(graph: Graph) -> None:
    """Erase what no output needs, checks of dead values too, which keep them alive (`nonzero` brings checks of its
    size).
    """
    live = _ancestors(graph.output_node())
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or node in live:
            continue
        if not node.is_impure() or not _tensors_behind(node) & live:
            graph.erase_node(node)


def _ancestors(node: Node) -> set[Node]:
    found, pending = set[Node](), [node]
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                pending.append(parent)
    return found


def _tensors_behind(node: Node) -> set[Node]:
    """The nearest tensors that a check's numbers come from."""
    found, pending = set[Node](), list(node.all_input_nodes)
    while pending:
        parent = pending.pop()
        if isinstance(parent.meta.get("val"), Tensor) or parent.op == "placeholder":
            found.add(parent)
        else:
            pending.extend(parent.all_input_nodes)
    return found


def _check_names(program: torch.export.ExportedProgram) -> None:
    """
    Raises:
        CaptureError: a tensor's name has a Python keyword in it: torch.fx cannot write code that reads it.
    """
    for name in [*program.state_dict, *program.constants]:
        for part in filter(keyword.iskeyword, name.split(".")):
            raise CaptureError(
                f"{name} is called by the Python keyword {part!r}, for which torch.fx writes code that is none; rename "
                "it"
            )


def _check_types(tensors: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        CaptureError: an input or output has a type that no array in Python has.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CaptureError(f"the {what} {name} is {kind}, which ONNX Runtime neither takes nor gives; convert it "
                               "in the model, to float32 for example")


def _select(labels: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Positions of the outputs called `wanted`, or below such a name."""
    chosen = []
    for name in wanted:
        found = [i for i, label in enumerate(labels) if label == name or label.startswith(f"{name}.")]
        if not found:
            raise CaptureError(f"the model has no output {name!r}; it has {', '.join(labels)}")
        chosen += [i for i in found if i not in chosen]
    return chosen


def _keep_outputs(graph_module: GraphModule, positions: Sequence[int]) -> None:
    """Keep these outputs, and what they need."""
    node = graph_module.graph.output_node()
    every = pytree.tree_leaves(node.args)
    kept = [every[i] for i in positions]
    node.args = (kept[0] if len(kept) == 1 else tuple(kept),)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _user_line(error: BaseException) -> str:
    """` at file:line: source` of the user's code that could not be captured, from the traceback or torch's own
    message.
    """
    import re
    import traceback

    root = str(torch.__path__[0])
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if not f.filename.startswith(root) and "repquant_fx" not in f.filename and not f.filename.startswith("<")]
    if frames:
        return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    match = re.search(r'File "([^"]+)", line (\d+)', str(error))
    return f", at {match.group(1)}:{match.group(2)}" if match else ""
