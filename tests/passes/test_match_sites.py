"""Match: everything is in a group or has a reason."""

from __future__ import annotations

import pytest
import torch
from helpers import Block, Encoder, PostNorm, aten, canonical, images, match, norm_groups, redraw, sequences, swin, vit
from torch import Tensor, nn
from torch.fx import GraphModule

from repquant_fx.passes.base import run_pass
from repquant_fx.passes.match_sites import MatchSites, Plan
from repquant_fx.passes.operators import NORMS, OTHER_NORMS, SOFTMAX
from repquant_fx.recipe import LayerRule, Recipe


def assert_complete(graph_module: GraphModule, plan: Plan) -> None:
    """Every norm and softmax is in exactly one group or has a reason; no product with a parameter is in two groups."""
    reasons = [item for item in plan.left_alone if "norm" in item.operator or item.operator == "softmax"]
    in_groups = [g.norm for g in plan.groups if g.norm is not None] + [
        g.softmax for g in plan.groups if g.softmax is not None
    ]
    assert len(in_groups) == len(set(in_groups))
    nodes = [
        n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in NORMS | OTHER_NORMS | SOFTMAX
    ]
    assert len(in_groups) + len(reasons) == len(nodes)
    assert all(len(item.reason) > 10 for item in plan.left_alone)
    consumers = [c for g in plan.groups for c in g.consumers]
    assert len(consumers) == len(set(consumers))
    names = [s.name for g in plan.groups for s in g.sites]
    assert len(names) == len(set(names))


def kinds(plan: Plan) -> list[str]:
    return [g.kind for g in plan.groups]


def test_vit(vit_graph) -> None:
    graph_module = vit_graph()
    text = str(graph_module.graph)
    plan = match(graph_module)
    assert str(graph_module.graph) == text
    assert_complete(graph_module, plan)
    block = ["norm_linear", "matmul", "matmul", "linear", "norm_linear", "linear"]
    assert kinds(plan) == ["linear", *block, *block, "norm_linear"]
    assert not plan.left_alone and not any(g.shared_norm for g in plan.groups)
    assert sum(len(g.consumers) for g in plan.groups) == 14  # graph order, no product left out
    softmax = [g for g in plan.groups if g.softmax is not None]
    assert [s.role for g in softmax for s in g.sites] == ["softmax", "plain"] * 2
    assert [s.name for s in softmax[0].sites] == ["blocks.0.attn/probabilities", "blocks.0.attn/value"]
    assert [s.name for s in plan.groups[2].sites] == ["blocks.0.attn/query", "blocks.0.attn/key"]


def test_swin(swin_graph) -> None:
    graph_module = swin_graph()
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    assert [item.path for item in plan.left_alone] == ["patch_embed.norm"]  # the residual stream itself
    assert {g.path for g in norm_groups(plan)} >= {"layers.1.downsample.norm", "norm", "layers.0.blocks.1.norm1"}
    assert sum(g.softmax is not None for g in plan.groups) == 3


def test_swin_whose_windows_pad_after_the_norm() -> None:
    import timm

    model = redraw(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=12,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            num_classes=5,
        )
    )
    graph_module = canonical(model, torch.randn(2, 3, 12, 12))
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    # the residual stream and another norm read it, no Linear
    assert [item.path for item in plan.left_alone] == ["patch_embed.norm"]
    padded = [group for group in plan.groups if group.padded]
    assert padded and all(group.path.endswith("norm1") for group in padded)


@pytest.mark.parametrize("options", [{"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg", "fc_norm": True},
                                     {"class_token": False, "global_pool": "avg"}])
def test_final_norm_with_pooling(options: dict[str, object]) -> None:
    graph_module = canonical(vit(1, **options), images(2))
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    final = plan.groups[-1]
    assert final.kind == "norm_linear" and final.sites[0].name == "head/input" and not final.shared_norm
    assert final.path in ("norm", "fc_norm")


def test_separate_query_key_and_value_are_one_group(encoder_graph) -> None:
    graph_module = encoder_graph()
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    first = norm_groups(plan)[0]
    assert len(first.sites) == 1 and len(first.consumers) == 3 and not first.shared_norm
    pooled = plan.groups[-1]
    assert pooled.path == "norm" and pooled.sites[0].value.target is aten.mean.dim


def test_shared_norms_are_flagged() -> None:
    graph_module = canonical(redraw(PostNorm()), sequences())
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    (group,) = norm_groups(plan)
    assert group.path == "norm" and group.shared_norm and "keep the original norm" in group.notes[0]
    (last,) = plan.left_alone
    assert last.path == "last" and "output of the model" in last.reason


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch, self.group = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.wide, self.head = nn.LayerNorm((8, 4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(torch.relu(self.batch(self.conv(x))))
        return self.head(h.mean((2, 3))) + self.wide(h[:, :, 0, :4]).mean()


def test_other_norms_have_reasons() -> None:
    graph_module = canonical(redraw(Convolutional()), images(2))
    plan = match(graph_module)
    assert_complete(graph_module, plan)
    reasons = {item.path: item.reason for item in plan.left_alone}
    assert "normalises over more than the channel axis" in reasons["batch"]
    assert "normalises over more than the channel axis" in reasons["group"]
    assert "2 axes" in reasons["wide"]
    assert kinds(plan) == ["conv", "linear"]


def test_a_softmax_that_is_an_output() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).softmax(-1)

    plan = match(canonical(redraw(Classifier()), sequences()))
    assert kinds(plan) == ["linear"]
    assert [(i.operator, i.reason) for i in plan.left_alone] == [
        ("softmax", "its result is not an operand of a matrix product")
    ]


def test_attention_from_the_right() -> None:
    class Right(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2) @ (x @ x.transpose(1, 2)).softmax(-1).transpose(1, 2)

    plan = match(canonical(Right(), sequences()))
    assert [[s.name.split("/")[1] for s in g.sites] for g in plan.groups] == [
        ["query", "key"],
        ["value", "probabilities"],
    ]
    assert [s.role for s in plan.groups[1].sites] == ["plain", "softmax"]


def test_uniform_softmax_is_an_ordinary_value(encoder_graph) -> None:
    plan = match(encoder_graph(), Recipe(softmax="uniform"))
    assert {s.role for g in plan.groups for s in g.sites} == {"norm", "plain"}
    assert sum(g.softmax is not None for g in plan.groups) == 1


def test_skips(encoder_graph) -> None:
    graph_module = encoder_graph()
    everything = match(graph_module)
    rules = (LayerRule("blocks.0.[qkv]", skip=True), LayerRule("blocks.0.fc2", skip=True), LayerRule("head", skip=True))
    plan = match(graph_module, Recipe(layers=rules))
    assert_complete(graph_module, plan)
    assert len(plan.groups) == len(everything.groups) - 3
    assert {i.path: i.reason for i in plan.left_alone} == dict.fromkeys(
        ["blocks.0.norm1", "norm"], "the recipe skips every Linear that reads it"
    )
    plan = match(graph_module, Recipe(layers=(LayerRule("blocks.0", skip=True),)))
    assert [(i.path, i.reason) for i in plan.left_alone] == [("blocks.0", "the recipe skips the product that reads it")]
    plan = match(graph_module, Recipe(layers=(LayerRule("*", skip=True),)))
    assert not plan.groups
    assert_complete(graph_module, plan)


def test_a_skipped_reader_keeps_the_original_norm(encoder_graph) -> None:
    plan = match(encoder_graph(), Recipe(layers=(LayerRule("blocks.0.k", skip=True),)))
    first = norm_groups(plan)[0]
    assert len(first.consumers) == 2 and first.shared_norm


def test_bits_by_layer(encoder_graph) -> None:
    plan = match(encoder_graph(), Recipe(wbits=4, abits=5, layers=(
        LayerRule("blocks.0.q", wbits=8, abits=7), LayerRule("blocks.0.f*", wbits=3), LayerRule("blocks.0", abits=6))))
    by_site = {s.name: s for g in plan.groups for s in g.sites}
    assert by_site["blocks.0.q/input"].bits == 7  # one scale serves q, k and v: the most bits asked for
    wbits = {c.meta["val"].shape[-1]: p.wbits for c, p in norm_groups(plan)[0].plans.items()}
    assert sorted(p.wbits for p in norm_groups(plan)[0].plans.values()) == [4, 4, 8] and wbits
    assert by_site["blocks.0/query"].bits == by_site["blocks.0/probabilities"].bits == 6
    assert by_site["head/input"].bits == 5
    assert [p.wbits for g in plan.groups if g.path == "blocks.0.fc2" for p in g.plans.values()] == [3]


def test_the_input_has_its_own_bits(vit_graph) -> None:
    def bits(recipe: Recipe) -> int:
        return match(vit_graph(), recipe).groups[0].sites[0].bits

    assert bits(Recipe(abits=4)) == 8
    assert bits(Recipe(abits=4, input_bits=6)) == 6
    assert bits(Recipe(abits=4, layers=(LayerRule("patch_embed.*", abits=5),))) == 5
    assert bits(Recipe(abits=4, layers=(LayerRule("patch_embed.*", wbits=5),))) == 8
    first = match(vit_graph(), Recipe(wbits=4, abits=4)).groups[0]
    assert [p.wbits for p in first.plans.values()] == [4]


def test_matching_again_gives_the_same_plan(vit_graph) -> None:
    graph_module, matching = vit_graph(), MatchSites(Recipe())
    plan = run_pass(graph_module, matching)
    first = [(g.kind, g.path, [s.name for s in g.sites]) for g in plan.groups]
    plan = run_pass(graph_module, matching)
    assert first == [(g.kind, g.path, [s.name for s in g.sites]) for g in plan.groups]


def test_position_tables_are_no_sites() -> None:
    class Rotary(nn.Module):
        """A product of positions with frequencies does not depend on data."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.rand(4))
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            table = torch.arange(x.shape[1])[:, None].float() @ self.frequencies[None, :]
            return self.block(x) * torch.cos(table).sum()

    plan = match(canonical(redraw(Rotary()), sequences(width=16)))
    assert sum(g.kind == "matmul" for g in plan.groups) == 2


def test_every_norm_style_is_matched() -> None:
    for norm in ("layer", "rms", "plain", "rms_plain"):
        graph_module = canonical(redraw(Encoder(norm=norm, bias=False)), sequences())
        plan = match(graph_module)
        assert_complete(graph_module, plan)
        assert len(norm_groups(plan)) == 3, norm


def test_models_are_never_empty_of_reasons() -> None:
    graph_module = canonical(swin(), images(2))
    assert_complete(graph_module, match(graph_module, Recipe(layers=(LayerRule("layers.0.*", skip=True),))))
