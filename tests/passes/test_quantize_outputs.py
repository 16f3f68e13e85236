"""An output that is transposed for a quantizer stays as it was computed, also in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from helpers import canonical, quantized, redraw, sequences, values_at
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repquant_fx import Recipe, compile
from repquant_fx.frontends.capture import tensors_in
from repquant_fx.passes.base import run_pass, run_passes
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.operators import QUANTIZE
from repquant_fx.passes.quantize_outputs import QuantizeOutputs


class Embedding(nn.Module):
    """The product of two vectors a sample, and the vectors; `form` says how the second one is turned and read."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.one, self.two, self.form = nn.Linear(8, 16), nn.Linear(8, 16), form

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one, two = torch.tanh(self.one(x[:, 0])), torch.tanh(self.two(x[:, 1]))
        turned = two.reshape(-1, 4, 4).permute(1, 2, 0).reshape(16, -1) if self.form == "reshaped" else two.t()
        last = {"no output": (), "read twice": (two, two.exp())}.get(self.form, (two,))
        return one @ turned, *last


def lowered(form: str) -> tuple[GraphModule, list[Node]]:
    run = quantized(canonical(redraw(Embedding(form)), sequences()), Recipe(**PLAIN), [sequences()])
    made = run_pass(run.graph_module, LowerToQDQ(run.plan, run.weights))
    return run.graph_module, list(made.quantizers.values())


@pytest.mark.parametrize("form", ["turned", "reshaped"])
def test_codes_and_outputs_are_the_same(form: str) -> None:
    graph_module, quantizers = lowered(form)
    x = sequences(5, seed=3)
    codes, expected = values_at(graph_module, quantizers, x), tensors_in(graph_module(x))
    before = [node.args[0] for node in graph_module.graph.find_nodes(op="call_function", target=QUANTIZE)]
    graph_module = run_passes(graph_module, [QuantizeOutputs()])
    outputs = graph_module.graph.output_node().all_input_nodes
    moved = [node for node in quantizers if node.args[0] not in before]
    assert [node.args[0] for node in moved] == outputs[1:2]
    assert all(map(torch.equal, tensors_in(graph_module(x)), expected))
    for node, old, new in zip(quantizers, codes, values_at(graph_module, quantizers, x)):
        assert torch.equal(*(t.flatten().sort().values for t in (new, old)) if node in moved else (new, old))
    assert not QuantizeOutputs()(graph_module).modified


@pytest.mark.parametrize("form", ["no output", "read twice"])
def test_what_onnx_runtime_leaves_as_it_is(form: str) -> None:
    assert not QuantizeOutputs()(lowered(form)[0]).modified


@pytest.mark.parametrize("form", ["turned", "reshaped"])
def test_onnx_runtime_gives_the_output_itself(form: str) -> None:
    """Without the pass it gives the dequantized codes: `parity` refuses the file."""
    result = compile(redraw(Embedding(form)), sequences(24), Recipe(**PLAIN), example_inputs=[sequences(4)])
    x = sequences(5, seed=3)
    found = result.session().run(None, {result.proto.graph.input[0].name: x.numpy()})
    for theirs, ours in zip(found, tensors_in(result.graph_module(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-5, atol=1e-5)
