"""Contracts of passes: checked, and what breaks one is named with all that ran before."""

from __future__ import annotations

import pytest
import torch
from compiled import PLAIN
from helpers import Encoder, Function, aten, canonical, images, match, quantized, redraw, sequences
from torch.fx import GraphModule, Node

from repquant_fx.errors import PassError
from repquant_fx.passes.base import Pass, copy_meta, run_pass, run_passes
from repquant_fx.passes.canonicalize import Canonicalize
from repquant_fx.passes.flatten_rows import FlattenRows
from repquant_fx.passes.fold_constants import FoldConstants
from repquant_fx.passes.fuse_requantization import FuseRequantization
from repquant_fx.passes.fuse_rms_norm import FuseRMSNorm
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.lower_to_qdq import LowerToQDQ
from repquant_fx.passes.match_sites import MatchSites
from repquant_fx.passes.operators import QUANTIZE
from repquant_fx.passes.share_masks import ShareMasks
from repquant_fx.passes.spec import CANONICAL, LOWERED, OBSERVED, RUNTIME
from repquant_fx.recipe import Recipe

FAST = Recipe(**PLAIN)


class Edit(Pass):
    """Puts an operator behind the first one where told to, and returns what it is told to."""

    name = "edit"

    def __init__(self, target: object, returned: bool) -> None:
        super().__init__()
        self.target, self.returned = target, returned

    def run(self, graph_module: GraphModule) -> bool:
        if self.target is not None:
            node = next(n for n in graph_module.graph.nodes if n.op == "call_function")
            insert(graph_module, node, self.target)
        return self.returned


def insert(graph_module: GraphModule, node: Node, target: object) -> Node:
    with graph_module.graph.inserting_after(node):
        new = graph_module.graph.call_function(target, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return copy_meta(node, new, node.meta["val"])


@pytest.mark.parametrize(("target", "returned", "message"), [
    (aten.relu.default, False, "returned False and changed the graph"),
    (None, True, "returned True and changed nothing")])
def test_what_a_pass_returns_is_checked(encoder_graph, target, returned: bool, message: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassError, match=message):
        run_passes(encoder_graph(), [Edit(target, returned)])
    monkeypatch.setenv("REPQUANT_FX_DEBUG", "0")
    run_passes(encoder_graph(), [Edit(target, returned)])


def test_constants_and_modules_count_as_changes(encoder_graph) -> None:
    class Replace(Pass):
        def run(self, graph_module: GraphModule) -> bool:
            name = next(name for name, _ in graph_module.named_parameters())
            owner = graph_module.get_submodule(name.rpartition(".")[0])
            with torch.no_grad():
                getattr(owner, name.rpartition(".")[2]).mul_(2)
            return False

    with pytest.raises(PassError, match="changed the graph"):
        run_passes(encoder_graph(), [Replace()])


def test_a_failure_names_every_pass_of_the_compile(vit_graph) -> None:
    run = quantized(vit_graph(), FAST, [images(8)])
    history = (r"^pass 'edit' failed after fold constants, canonicalize, fuse RMS norms, .*match sites, "
               r"insert observers, install decision \(\d+ times\), reparameterize norms \(\d+ times\), .*: it returned")
    with pytest.raises(PassError, match=history):
        run_passes(run.graph_module, [Edit(None, True)])


def test_stages_name_the_node() -> None:
    x = sequences()
    graph_module = canonical(redraw(Encoder()), x)
    for stage in (CANONICAL, OBSERVED, LOWERED, RUNTIME):
        stage.check(graph_module)
    node = next(n for n in graph_module.graph.nodes if n.target is aten.linear.default)
    clone = insert(graph_module, node, aten.clone.default)
    with pytest.raises(PassError, match=rf"not canonical: {clone.name} \(aten.clone.default\) has another spelling"):
        CANONICAL.check(graph_module)
    with pytest.raises(PassError, match=r"'insert observers' failed after .*the graph is not canonical"):
        run_passes(graph_module, [InsertObservers(match(canonical(redraw(Encoder()), x)), 1)])


def test_lowered_graphs() -> None:
    x = sequences()
    run = quantized(canonical(redraw(Encoder()), x), FAST, [x])
    OBSERVED.check(run.graph_module)
    with pytest.raises(PassError, match=r"not canonical: .* belongs to a later form|calls a module"):
        CANONICAL.check(run.graph_module)
    graph_module = run_passes(run.graph_module, [LowerToQDQ(run.plan, run.weights)])
    with pytest.raises(PassError, match="belongs to a later form"):
        OBSERVED.check(graph_module)
    quantize = next(n for n in graph_module.graph.nodes if n.target is QUANTIZE)
    moved = insert(graph_module, quantize, aten.neg.default)
    with pytest.raises(PassError, match=f"not in runtime form: {moved.name} .* reads integer codes"):
        RUNTIME.check(graph_module)
    moved.target, moved.args = aten.reshape.default, (quantize, [-1, 16])
    RUNTIME.check(graph_module)
    with pytest.raises(PassError, match=r"not lowered: .* reads integer codes"):
        LOWERED.check(graph_module)
    quantize.args[0].meta["val"] = quantize.args[0].meta["val"].double()
    with pytest.raises(PassError, match=rf"{quantize.name} .* of torch.float64, not torch.float32"):
        RUNTIME.check(graph_module)


def test_lowering_asks_for_quantizers(encoder_graph) -> None:
    graph_module = encoder_graph()
    plan = match(graph_module)
    run_passes(graph_module, [InsertObservers(plan, 1)])
    with pytest.raises(PassError, match=r"'lower to Q/DQ' failed after .*: .*/\w+ holds an observer"):
        run_passes(graph_module, [LowerToQDQ(plan, {})])


def runtime(graph_module: GraphModule, x: torch.Tensor) -> tuple[GraphModule, list[Pass]]:
    run = quantized(graph_module, FAST, [x])
    lowered = run_pass(run.graph_module, LowerToQDQ(run.plan, run.weights))
    return run.graph_module, [FuseRequantization(lowered.quantizers), FlattenRows(), ShareMasks()]


@pytest.mark.parametrize("name", ["vit_graph", "swin_graph", "encoder_graph"])
def test_a_second_run_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    """What is returned is what was done, both times; every other test runs under this contract, too."""
    graph_module = request.getfixturevalue(name)()
    x = sequences() if name == "encoder_graph" else images(8)
    for each in (FoldConstants(), Canonicalize(), FuseRMSNorm(), MatchSites(Recipe())):
        assert not each(graph_module).modified
    lowered, passes = runtime(graph_module, x)
    assert [each(lowered).modified for each in passes[:2]] == [True, True]
    assert not passes[0].run(lowered).modified and not any(each(lowered).modified for each in passes[1:])


def test_sizes_alone_are_a_change() -> None:
    """A graph where nothing but the place that a size is read from differs."""
    function = Function(lambda x: torch.relu(x).reshape(x.shape[0] * 2, -1) + torch.zeros(x.shape[0] * 2, 1))
    graph_module = canonical(function, torch.randn(4, 6))
    relu = next(n for n in graph_module.graph.nodes if n.target is aten.relu.default)
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        relu.append(node)
        node.args = (relu, 0)
    graph_module.recompile()
    assert FlattenRows()(graph_module).modified and not FlattenRows()(graph_module).modified


def test_what_is_left_alone_has_a_reason() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.a(x)
            return a @ self.b(x).transpose(1, 2) + a.sum(-1, keepdim=True)

    lowered, passes = runtime(canonical(redraw(Residual()), sequences()), sequences())
    run_passes(lowered, passes)
    (left,) = passes[0].left_alone
    assert (left.path, left.operator, left.by) == ("a", "linear", "fuse requantization")
    assert "not only quantized operands" in left.reason
    masked = Function(lambda x: torch.softmax(x.masked_fill(torch.ones(1, 6, 8).tril().bool(), -1e4), -1))
    mask = canonical(masked, sequences())
    share = ShareMasks()
    assert not share(mask).modified and "low enough" in share.left_alone[0].reason
