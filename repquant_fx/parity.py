"""Does a runtime compute what the FX reference computes? Compared code for code, at every quantizer.

Two questions are kept apart. *Free running*: both execute the whole model; a code on a rounding boundary may flip by
one and what follows then differs too, so this is reported, not judged. *Step by step*: the FX graph is fed the
runtime's own codes at every quantizer, so that each step is compared on equal inputs: codes may differ by at most one,
rarely, and the output only by float rounding. This is judged, but where float rounding itself decides: where something
differs, the reference runs once more on the same codes with every value moved by rounding, and what that moves does not
count (the norm of values that are all equal but for their last bits, a comparison at a tie).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repquant_fx.errors import ParityError
from repquant_fx.exporters.apart import OnnxModel
from repquant_fx.exporters.signed_codes import MIDDLE
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.naming import DEQUANTIZED, QUANTIZED, SCALE, UINT8
from repquant_fx.passes.base import attribute
from repquant_fx.passes.operators import CODE_MOVES, DEQUANTIZE, LOG2_QUANTIZE, LOG2_SOFTMAX, QUANTIZE
from repquant_fx.quantizers.logarithmic import zero_code
from repquant_fx.recorder import Recorder, shaken
from repquant_fx.runtimes import loader
from repquant_fx.targets import RUNTIMES
from repquant_fx.torch_private import pytree, size_hint

# of a step: this near to the midpoint of two codes either is right; products of quantized values often lie exactly
# there
TIE = 1e-3
BLIND = 0.25  # of a code: where float rounding of a logit moves it by more, its probability says nothing
SHAKE, TIMES = 2.0**-21, 16  # a few roundings of float32, and how often they are drawn
SHARE_LIMIT = 0.005  # of codes that may flip by one at one quantizer, on equal inputs
UNDERFLOW = 200.0  # a logit so far below the largest has the probability zero
OUTPUT_LIMIT = 1e-3  # of the largest output, on equal codes
AMPLIFIED = 10  # an output that rounding moves by a tenth of a difference does not tell rounding from a mistake


@dataclass(frozen=True)
class CodeDifference:
    """Codes of one quantizer: `share` that differ in a free run; on equal inputs, `share_step` that differ where the
    value is no tie, and `largest_step` anywhere; `share_blind` that float32 does not tell, and that are not judged."""

    share: float
    share_step: float
    largest_step: int
    share_blind: float = 0.0


@dataclass(frozen=True)
class Parity:
    """The comparison on `samples` held-back samples.

    Attributes:
        output_sqnr: of the runtime's output against the FX reference's, free running, dB (infinite when equal).
        output_step: largest output difference on equal codes, relative to the largest output.
        quantizers: by site name.
        runtime: which one, for messages.
        reference: what it was compared with, for messages.
    """

    samples: int
    output_sqnr: float
    output_step: float
    quantizers: dict[str, CodeDifference]
    runtime: str = RUNTIMES["ort"]
    reference: str = "the FX reference"

    @property
    def share(self) -> float:
        """Mean share of differing codes over quantizers, free running."""
        return sum(q.share for q in self.quantizers.values()) / max(1, len(self.quantizers))

    def problems(self) -> list[str]:
        """What goes beyond float rounding, as sentences; empty when nothing does."""
        found = []
        for name, q in self.quantizers.items():
            if q.largest_step > 1 or q.share_step > SHARE_LIMIT:
                found.append(f"{name}: {100 * q.share_step:.3g} % of the codes differ, by up to {q.largest_step}")
        if not self.output_step <= OUTPUT_LIMIT:
            found.append(f"the output differs by {self.output_step:.3g} of its largest value on equal codes")
        return found

    def raise_on_problems(self) -> None:
        """
        Raises:
            ParityError: there are problems.
        """
        found = self.problems()
        if found:
            more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
            raise ParityError(
                f"{self.runtime} and {self.reference} disagree beyond float rounding: " + "; ".join(found[:5]) + more
            )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean_share": self.share, "agrees": not self.problems()}


def compare(
    graph_module: GraphModule, model: onnx.ModelProto | OnnxModel, quantizers: Mapping[str, Node],
    inputs: Sequence[Tensor], input_names: Sequence[str], runtime: str = "ort",
) -> Parity:
    """Run both on the same inputs.

    Args:
        graph_module: the lowered FX reference.
        quantizers: nodes that produce codes (or log-quantized values), by site name.
        inputs: positional, one batch.
        runtime: one of `targets.RUNTIMES`.

    Raises:
        InputError: the runtime is not installed, or refuses the file.
    """
    load, model = loader(runtime), OnnxModel.of(model)
    values = {name: value_name(node) for name, node in quantizers.items()}
    exposed = expose(model.proto, [(values[name], not _logarithmic(node)) for name, node in quantizers.items()])
    feed = dict(zip(input_names, inputs))
    outputs = len(model.proto.graph.output)
    found, exposed_values = load(model)(feed), load(replace(model, proto=exposed))(feed)
    internal = dict(zip(quantizers, exposed_values[outputs:]))
    free, step = CodeRecorder(graph_module, quantizers, {}), CodeRecorder(graph_module, quantizers, internal)
    expected, forced = tensors_in(free.run(*inputs)), tensors_in(step.run(*inputs))
    theirs = {name: codes(internal[name], node, graph_module) for name, node in quantizers.items()}

    def judged(sure: _Sure | None) -> Parity:
        differences = {name: _code_difference(theirs[name], free, step, name, sure) for name in quantizers}
        given = exposed_values[:outputs] if sure is None else sure.outputs(exposed_values[:outputs], forced)
        sized = [a for a, known in zip(zip(given, forced, strict=True), _sized(graph_module), strict=True) if known]
        apart = max((largest_difference(*pair) for pair in sized), default=0.0)
        return Parity(len(inputs[0]), min(sqnr(a, b) for a, b in zip(found, expected)), apart, differences,
                      RUNTIMES[runtime])

    parity = judged(None)
    return judged(_Sure(graph_module, step, quantizers, inputs)) if parity.problems() else parity


def _code_difference(
    theirs: Tensor, free: CodeRecorder, step: CodeRecorder, name: str, sure: _Sure | None
) -> CodeDifference:
    apart = (step.seen[name] - theirs).abs()
    blind = step.blind.get(name, torch.zeros_like(apart, dtype=torch.bool))
    if sure is not None:
        blind = blind | sure.blind[name]
    judged = apart[~blind]
    return CodeDifference(
        share=share_of(free.seen[name] != theirs), share_step=share_of((judged > 0) & ~step.ties[name][~blind]),
        largest_step=int(judged.max()) if judged.numel() else 0, share_blind=share_of(blind))


def _sized(graph_module: GraphModule) -> list[bool]:
    """Of each output, whether its size is known: how many values are picked out may turn on the rounding of one."""
    return [
        all(size_hint(size) is not None for size in node.meta["val"].shape)
        for node in pytree.tree_leaves(graph_module.graph.output_node().args[0])
        if isinstance(node, Node)
    ]


class _Sure:
    """What float rounding does not decide: the reference on the same codes, with every value in between moved by it, a
    few times over.

    Attributes:
        blind: where a quantizer's codes move, boolean, by site name.
        moved: the outputs of each time.
    """

    def __init__(
        self, graph_module: GraphModule, step: CodeRecorder, quantizers: Mapping[str, Node], inputs: Sequence[Tensor]
    ) -> None:
        self.blind = {name: torch.zeros_like(seen, dtype=torch.bool) for name, seen in step.seen.items()}
        self.moved: list[list[Tensor]] = []
        names = {node: name for name, node in quantizers.items()}
        generator = torch.Generator().manual_seed(0)

        def shake(node: Node, value: Any) -> Any:
            if node in names:
                name = names[node]
                self.blind[name] |= codes(value, node, graph_module) != step.seen[name]
                return step.given[name]
            return shaken(value, SHAKE, generator)

        moving = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        for _ in range(TIMES):
            with torch.no_grad():
                self.moved.append(tensors_in(Recorder(graph_module, moving, shake).run(*inputs)))

    def outputs(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Tensor]:
        """What was found, but what was expected where rounding decides: elements of outputs that are no floats, and
        all of a float output that rounding moves far.
        """
        return [self._output(*each) for each in zip(found, expected, *self.moved, strict=True)]

    def _output(self, found: Tensor, expected: Tensor, *moved: Tensor) -> Tensor:
        if any(each.shape != expected.shape for each in (found, *moved)):
            return found
        if not expected.is_floating_point():
            return torch.where(torch.stack([expected == each for each in moved]).all(0), found, expected)
        furthest = max(largest_difference(each, expected) for each in moved)
        return expected if largest_difference(found, expected) <= AMPLIFIED * furthest else found


def share_of(different: Tensor) -> float:
    """Share of the elements that are true, 0 of none."""
    return float(different.double().mean()) if different.numel() else 0.0


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value: infinite where shapes differ, 0 where there are no elements."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    alike = (found == expected) | (found.isnan() & expected.isnan())  # infinities too
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).max().clamp(min=1e-12)
    return float((torch.where(alike, 0.0, (found - expected).abs()) / largest).max())


def sqnr(approximation: Tensor, reference: Tensor, counts: Tensor | None = None) -> float:
    """Signal to quantization noise ratio, dB, of what counts (see `quantizers.counted`)."""
    signal, noise = signal_and_noise(approximation, reference, counts)
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)))


def signal_and_noise(
    approximation: Tensor, reference: Tensor, counts: Tensor | None = None
) -> tuple[float, float]:
    """Sums of squares of the reference, where it is finite and counts, and of what the approximation lacks there.

    All is noise where the sizes differ, as those of values picked out do: nothing of the reference is found.
    """
    finite = reference.isfinite() if counts is None else reference.isfinite() & counts
    expected = torch.where(finite, reference, 0).double().reshape(-1)
    if approximation.numel() != expected.numel():
        found = torch.zeros_like(expected)
    else:
        found = torch.where(finite.reshape(-1), approximation.reshape(-1), 0).nan_to_num(0.0, 0.0, 0.0).double()
    return float(expected.square().sum()), float((found - expected).square().sum())


def value_name(node: Node) -> str:
    """Name of a quantizer's value in the exported file (see `exporters.naming`)."""
    named = node
    # codes that were moved about: what reads them knows the scale
    if node.target is not QUANTIZE and not _logarithmic(node):
        named = _dequantizer(node)
    scale = named.args[1]
    assert isinstance(scale, Node)
    return (DEQUANTIZED if _logarithmic(node) else QUANTIZED).of(SCALE.stem(str(scale.target)) or "")


def _dequantizer(codes: Node) -> Node:
    """What dequantizes codes, beyond a cache too."""
    pending = [codes]
    while True:
        node = pending.pop(0)
        if node.target is DEQUANTIZE:
            return node
        pending += node.users


def _logarithmic(node: Node) -> bool:
    return node.target in (LOG2_SOFTMAX, LOG2_QUANTIZE)


def expose(proto: onnx.ModelProto, values: Sequence[tuple[str, bool]]) -> onnx.ModelProto:
    """A copy with further outputs: `(name, whether integer codes)`, as uint8, else float32 values. Signed codes (see
    `exporters.signed_codes`) become what they would be as uint8.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    types = {node.output[0]: types.get(node.input[2]) for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    for name, integer in values:
        if types.get(name) == onnx.TensorProto.INT8:
            name = _unsigned(copy, name)
        if types.get(name) == onnx.TensorProto.UINT4:
            copy.graph.node.append(onnx.helper.make_node("Cast", [name], [UINT8.of(name)], to=onnx.TensorProto.UINT8))
            name = UINT8.of(name)
        kind = onnx.TensorProto.UINT8 if integer else onnx.TensorProto.FLOAT
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return copy


def _unsigned(model: onnx.ModelProto, name: str) -> str:
    """Add nodes that make uint8 of int8 codes; the name of what they give."""
    wide, shifted, result = (UINT8.of(name) + suffix for suffix in ("_wide", "_shifted", ""))
    model.graph.initializer.append(onnx.helper.make_tensor(f"{result}_middle", onnx.TensorProto.INT32, [], [MIDDLE]))
    model.graph.node.extend([
        onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.INT32),
        onnx.helper.make_node("Add", [wide, f"{result}_middle"], [shifted]),
        onnx.helper.make_node("Cast", [shifted], [result], to=onnx.TensorProto.UINT8),
    ])
    return result


def codes(values: Tensor, node: Node, graph_module: GraphModule) -> Tensor:
    """Integer codes (int16) of what a quantizer node gives: uint8 codes as they are, log-quantized values decoded."""
    if not _logarithmic(node):
        return values.to(torch.int16)
    bits, steps = node.args[-2:]
    scale = float(attribute(graph_module, cast(Node, node.args[1])))
    top = zero_code(int(bits))  # type: ignore[arg-type]
    decoded = torch.round(-int(steps) * torch.log2(values.double() / scale))  # type: ignore[arg-type]
    return torch.where(values == 0, torch.full_like(decoded, top), decoded).to(torch.int16)


def ties(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Where a value lies midway between two codes; a scale that is no scalar belongs to an axis of `x`."""
    if scale.ndim:
        scale = scale.reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    steps = x.double() / scale.double()
    return (steps - steps.floor() - 0.5).abs() <= TIE


class CodeRecorder:
    """Runs a lowered graph and sees each quantizer's own codes; goes on with the given values instead where there are
    any.

    Attributes:
        seen: codes by site name, int16, of the last run.
        ties: where they may differ, boolean, by site name.
        blind: where logits of a Softmax are so large that float32 does not tell their codes, boolean, by site name.
    """

    def __init__(self, graph_module: GraphModule, quantizers: Mapping[str, Node], given: Mapping[str, Tensor]) -> None:
        self.graph_module, self.given = graph_module, given
        self.names = {node: name for name, node in quantizers.items()}
        self.seen: dict[str, Tensor] = {}
        self.ties: dict[str, Tensor] = {}
        self.blind: dict[str, Tensor] = {}
        self._tied: dict[Node, Any] = {}  # ties of codes, carried along with them through layout operators
        moving = (n for n in graph_module.graph.nodes if n.target is QUANTIZE or n.target in CODE_MOVES)
        self._recorder = Recorder(graph_module, [*moving, *self.names], self._visit)

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> Any:
        """The graph's outputs."""
        self._tied = {}
        return self._recorder.run(*inputs)

    def _visit(self, node: Node, value: Any) -> Any:
        if node.target is QUANTIZE:
            self._tied[node] = self._ties(node)
        elif node.target in CODE_MOVES and node.args[0] in self._tied:
            args, kwargs = self._recorder.fetch_args_kwargs_from_env(node)
            self._tied[node] = cast(Any, node.target)(self._tied[cast(Node, node.args[0])], *args[1:], **kwargs)
        name = self.names.get(node)
        if name is None:
            return value
        self.seen[name] = seen = codes(value, node, self.graph_module)
        if node.target is LOG2_SOFTMAX:
            self.blind[name] = self._blind(node)
        self.ties[name] = self._tied[node] if node in self._tied else torch.zeros_like(seen, dtype=torch.bool)
        return self.given.get(name, value)

    def _blind(self, node: Node) -> Tensor:
        """Where the rounding of a logit and of the largest in its row moves a code. One that is far below the largest,
        as a masked one is, stays at zero all the same.
        """
        logits, _, dim, _, steps = self._recorder.fetch_args_kwargs_from_env(node)[0]
        x = logits.double()
        largest = x.amax(dim, keepdim=True)
        rounding = (x.abs() + largest.abs()) * torch.finfo(torch.float32).eps
        return (rounding * steps / math.log(2) > BLIND) & (largest - x < 8 * rounding + UNDERFLOW)

    def _ties(self, node: Node) -> Tensor:
        """Where the value to quantize lies midway between two codes."""
        x, scale = self._recorder.fetch_args_kwargs_from_env(node)[0][:2]
        return ties(x, scale, cast(int, node.args[4]))
