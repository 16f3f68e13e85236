"""Capture: a module or an ExportedProgram becomes an ATen-level GraphModule in which attention is MatMul, Softmax, MatMul.

torch.export keeps norms, linears, convolutions and softmax whole; only scaled_dot_product_attention is decomposed, by our own
rule. torch's math decomposition is wrong with boolean masks on this path, and its default table would break Linear apart.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from repquant_fx.errors import CaptureError, RepQuantWarning

aten = torch.ops.aten


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph_module: ATen-level; owns its parameters (the caller's model is never mutated).
        input_names: names of the forward arguments, in order.
        output_names: one a flattened output tensor.
        eager_difference: largest absolute difference between the graph's and the model's outputs on the example inputs,
            divided by the largest absolute output.
        dynamic_batch: whether the batch dimension is symbolic.
    """

    graph_module: GraphModule
    input_names: list[str]
    output_names: list[str]
    eager_difference: float
    dynamic_batch: bool


def decompose_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """`softmax(q k^T * scale + mask) v` out of visible operators.

    Masked logits become `finfo.min`, not -inf: a row that is masked whole (left padding) stays finite.
    """
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        if groups > 1:
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
    logits = torch.matmul(query * factor, key.transpose(-2, -1))
    lowest = torch.finfo(logits.dtype).min
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        cols = torch.arange(key.shape[-2], device=query.device)[None, :]
        logits = logits.masked_fill(cols > rows, lowest)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, lowest) if attn_mask.dtype == torch.bool else logits + attn_mask
    return torch.matmul(torch.softmax(logits, -1), value)


def capture(
    module: nn.Module | torch.export.ExportedProgram, example_inputs: Sequence[Tensor], *, dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None, dynamic_axes: Sequence[dict[int, str]] | None = None, outputs: Sequence[str] | None = None,
) -> Captured:
    """Capture a model and check the graph against it.

    Args:
        module: a module (put in eval mode, not mutated), or an ExportedProgram.
        example_inputs: positional inputs; the batch is dimension 0 of each and must be at least 2 to become dynamic.
        dynamic_batch: make dimension 0 of every input symbolic. Falls back to static, with a warning, where the model
            does not allow it.

    Raises:
        CaptureError: control flow that depends on values, unsupported inputs, or a graph that does not equal the model.
    """
    inputs = tuple(example_inputs)
    reference: nn.Module
    if isinstance(module, torch.export.ExportedProgram):
        program, reference = module, module.module(check_guards=False)
        dynamic = _has_dynamic_batch(program)
    else:
        reference = module.eval()
        program, dynamic = _export(reference, inputs, dynamic_batch, dynamic_axes, input_names)
    try:
        unlifted = program.run_decompositions({aten.scaled_dot_product_attention.default: decompose_attention}).module(
            check_guards=False)
    except Exception as error:
        raise CaptureError(f"cannot decompose the attention of the captured model: {_first_line(error)}") from error
    graph_module = cast(GraphModule, copy.deepcopy(unlifted))  # it shares storage with the caller's parameters
    _keep_nothing_but_the_graph(graph_module)
    with torch.no_grad():
        if input_names is not None:
            graph_module.graph.set_codegen(torch.fx.graph.CodeGen())
            result = reference(**dict(zip(input_names, inputs)))
            node = graph_module.graph.output_node()
            flat = pytree.tree_leaves(result)
            keep = [next(i for i, t in enumerate(flat) if t is result[k]) for k in outputs] if outputs else list(range(len(flat)))
            node.args = (tuple(pytree.tree_leaves(node.args[0])[i] for i in keep),)
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
            expected = [flat[i] for i in keep]
        else:
            expected = tensors_in(reference(*inputs))
        found = tensors_in(graph_module(*inputs))
    difference = 0.0
    for e, f in zip(expected, found, strict=True):
        if e.numel() and e.is_floating_point():
            difference = max(difference, float((e - f).abs().max() / e.abs().max().clamp(min=1e-12)))
    if not difference < 1e-3:
        raise CaptureError(f"the captured graph does not equal the model: relative difference {difference:.3g}; "
                           "the model may be in training mode, draw random numbers or depend on input values")
    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    if input_names is not None:
        names = list(input_names)
        for node, name in zip([n for n in graph_module.graph.nodes if n.op == "placeholder"], names):
            node.target = node.name = name
        graph_module.recompile()
    given = list(outputs) if outputs is not None else ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]
    return Captured(graph_module, names, given, difference, dynamic)


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of a model's output, flattened in order."""
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _export(module: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool,
            axes: Sequence[dict[int, str]] | None = None, names: Sequence[str] | None = None) -> tuple[torch.export.ExportedProgram, bool]:
    attempts: list[tuple[Any, bool]] = []
    if dynamic_batch and all(t.ndim and t.shape[0] >= 2 for t in inputs):
        batch = torch.export.Dim("batch", min=1)
        attempts.append((tuple({0: batch} for _ in inputs), True))
    if axes is not None:
        attempts = [(tuple({i: torch.export.Dim.DYNAMIC for i in a} for a in axes), True)]
    attempts.append((None, False))
    problem: Exception | None = None
    for shapes, dynamic in attempts:
        try:
            with warnings.catch_warnings(), torch.no_grad(), quiet_torch():
                warnings.simplefilter("ignore")
                program = torch.export.export(
                    module, () if names else inputs, dict(zip(names, inputs)) if names else None, strict=False,
                    dynamic_shapes=_per_parameter(module, inputs, shapes) if not names else dict(zip(names, shapes)) if shapes else None)
        except Exception as error:
            problem = problem or error
            continue
        if dynamic_batch and not dynamic and problem is not None:
            warnings.warn(f"the model does not allow a dynamic batch; captured with batch {inputs[0].shape[0]} "
                          f"({_first_line(problem)})", RepQuantWarning, stacklevel=3)
        return program, dynamic
    assert problem is not None
    raise CaptureError(f"torch.export cannot capture the model: {_first_line(problem)}{_user_line(problem)}. "
                       "Control flow that depends on tensor values must become torch.where or torch.cond") from problem


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back what torch logs and prints during an export: a failure repeats in many lines what the error says."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _per_parameter(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[object, ...] | None) -> object:
    """dynamic_shapes in the form export expects: a `*args` forward takes its inputs as one tuple."""
    import inspect

    if shapes is None:
        return None
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if kinds and kinds[0] == inspect.Parameter.VAR_POSITIONAL:
        return (shapes,)
    return shapes


def _has_dynamic_batch(program: torch.export.ExportedProgram) -> bool:
    users = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in users and isinstance(node.meta.get("val"), Tensor):
            return isinstance(node.meta["val"].shape[0], torch.SymInt)
    return False


def _keep_nothing_but_the_graph(graph_module: GraphModule) -> None:
    """Unlift leaves input guards and pytree hooks behind; later passes want the plain graph."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and "guard" in str(node.target):
            graph_module.graph.erase_node(node)
    for parameter in graph_module.parameters():
        parameter.requires_grad_(False)
    graph_module.recompile()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _user_line(error: BaseException) -> str:
    """` at file:line: source` of the user's code that could not be captured, from the traceback or torch's own message."""
    import re
    import traceback

    root = str(torch.__path__[0])
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if not f.filename.startswith(root) and "repquant_fx" not in f.filename and not f.filename.startswith("<")]
    if frames:
        return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    match = re.search(r'File "([^"]+)", line (\d+)', str(error))
    return f", at {match.group(1)}:{match.group(2)}" if match else ""
