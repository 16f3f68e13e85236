"""Rewritings that claim a float identity, on operators composed at random: outputs before and after agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from helpers import aten, bypass, match, norm_groups, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from repquant_fx.passes.base import add_tensor, run_passes, shared_copy
from repquant_fx.passes.equalize_layers import EqualizeLayers, find_equalizable
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.reparameterize_norms import ReparameterizeNorms
from repquant_fx.passes.slots import install
from repquant_fx.quantizers.clipping import Bounds
from repquant_fx.quantizers.equalization import equalize
from repquant_fx.quantizers.observers import UniformQuantizer

CHANNELS = 4
BITS = 8


class Builder:
    """Writes a canonical graph operator by operator, with the metadata that matchers read."""

    def __init__(self) -> None:
        self.root, self.graph, self.mode = nn.Module(), Graph(), FakeTensorMode(allow_non_fake_inputs=True)
        self.generator = torch.Generator().manual_seed(0)

    def input(self, *shape: int) -> Node:
        node = self.graph.placeholder("x")
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        return node

    def constant(self, value: Tensor) -> Node:
        node = self.graph.get_attr(add_tensor(self.root, "constant", value))  # type: ignore[arg-type]
        node.meta["val"] = value
        return node

    def random(self, *shape: int) -> Node:
        return self.constant(torch.randn(shape, generator=self.generator))

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node

    def channels_first(self, x: Node, target: Any, *args: Any) -> Node:
        images = self.call(aten.permute.default, x, [0, 3, 1, 2])
        return self.call(aten.permute.default, self.call(target, images, *args), [0, 2, 3, 1])

    def linear(self, x: Node, outputs: int) -> Node:
        return self.call(aten.linear.default, x, self.random(outputs, shape(x)[-1]), self.random(outputs))

    def module(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs)
        return GraphModule(self.root, self.graph)


def shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)


def windows(b: Builder, x: Node) -> Node:
    n, h, w, c = shape(x)
    if h % 2 or w % 2:
        return x
    tiles = b.call(aten.reshape.default, x, [n, h // 2, 2, w // 2, 2, c])
    tiles = b.call(aten.permute.default, tiles, [0, 1, 3, 2, 4, 5])
    return b.call(aten.reshape.default, tiles, [n * h * w // 4, 2, 2, c])


def attention(b: Builder, x: Node) -> Node:
    n, h, w, c = shape(x)
    tokens = b.call(aten.reshape.default, x, [n, h * w, c])
    weights = b.call(aten.softmax.int, b.random(h * w, h * w), -1)
    return b.call(aten.reshape.default, b.call(aten.matmul.default, weights, tokens), [n, h, w, c])


def chosen(b: Builder, x: Node) -> Node:
    """Rows in an order that the data decides."""
    keys = b.call(aten.select.int, b.call(aten.select.int, b.call(aten.select.int, x, 0, 0), 1, 0), 1, 0)
    return b.call(aten.index.Tensor, x, [None, b.call(aten.argsort.default, b.call(aten.sigmoid.default, keys))])


def masked(b: Builder, x: Node) -> Node:
    mask = torch.arange(shape(x)[1])[:, None, None] % 2 == 0
    return b.call(aten.masked_fill.Scalar, x, b.constant(mask), 0.0)


# functions of a (batch, height, width, channels) value that give another one
STEPS: dict[str, Callable[[Builder, Node], Node]] = {
    "pad": lambda b, x: b.call(aten.pad.default, x, [0, 0, 0, 1, 1, 0]),
    "pad with ones": lambda b, x: b.call(aten.constant_pad_nd.default, x, [0, 0, 1, 0], 1.0),
    "crop": lambda b, x: b.call(aten.slice.Tensor, x, 1, min(1, shape(x)[1] - 1), 1 << 40),
    "roll": lambda b, x: b.call(aten.roll.default, x, [1, -1], [1, 2]),
    "flip": lambda b, x: b.call(aten.flip.default, x, [1]),
    "windows": windows,
    "tokens": lambda b, x: b.call(aten.reshape.default, x, [shape(x)[0], 1, -1, shape(x)[3]]),
    "select": lambda b, x: b.call(aten.unsqueeze.default, b.call(aten.select.int, x, 1, -1), 1),
    "index": lambda b, x: b.call(aten.index.Tensor, x, [None, b.constant(torch.tensor([shape(x)[1] - 1, 0]))]),
    "chosen": chosen,
    "mean": lambda b, x: b.call(aten.mean.dim, x, [1], True),
    "mean of both": lambda b, x: b.call(aten.mean.dim, x, [1, 2], True),
    "largest": lambda b, x: b.call(aten.amax.default, x, [2], True),
    "sum": lambda b, x: b.call(aten.sum.dim_IntList, x, [1], True),
    "adaptive pool": lambda b, x: b.channels_first(x, aten.adaptive_avg_pool2d.default, [2, 2]),
    "max pool": lambda b, x: b.channels_first(x, aten.max_pool2d.default, [2, 2], [1, 1], [1, 1]),
    "average pool": lambda b, x: b.channels_first(x, aten.avg_pool2d.default, [2, 2], [1, 1], [1, 1]),
    "average pool without padding": lambda b, x: b.channels_first(
        x, aten.avg_pool2d.default, [2, 2], [2, 1], [1, 1], False, False
    ),
    "enlarge": lambda b, x: b.channels_first(x, aten.upsample_nearest2d.vec, None, [2.0, 2.0]),
    "concat": lambda b, x: b.call(aten.cat.default, [x, b.call(aten.roll.default, x, [1], [1])], 2),
    "concat padded": lambda b, x: b.call(aten.cat.default, [x, b.call(aten.pad.default, x, [0, 0, 0, 1])], 2),
    "concat zeros": lambda b, x: b.call(aten.cat.default, [x, b.constant(torch.zeros(shape(x)))], 1),
    "add": lambda b, x: b.call(aten.add.Tensor, x, b.call(aten.flip.default, x, [2])),
    "add padded": lambda b, x: b.call(
        aten.add.Tensor, *(b.call(aten.pad.default, x, [0, 0, *by]) for by in ([0, 1], [1, 0]))
    ),
    "add constant": lambda b, x: b.call(aten.add.Tensor, x, 1.0),
    "mask": masked,
    "scale": lambda b, x: b.call(aten.mul.Tensor, x, 0.5),
    "relu": lambda b, x: b.call(aten.relu.default, x),
    "attention": attention,
}
steps = st.lists(st.sampled_from(sorted(STEPS)), max_size=5)
many = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def composed(source: Callable[[Builder, Node], Node], *branches: list[str]) -> GraphModule:
    """Input, source, and for each branch its steps and a Linear."""
    b = Builder()
    start = source(b, b.input(2, 4, 4, CHANNELS))
    results = []
    for branch in branches:
        x = start
        for name in branch:
            x = x if math.prod(shape(x)) > 2000 else STEPS[name](b, x)
        results.append(b.linear(x, 3))
    return b.module(*results)


def outputs_differ(before: GraphModule, after: GraphModule) -> float:
    x = torch.randn(2, 4, 4, CHANNELS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return max(relative(a, b) for a, b in zip(after(x), before(x), strict=True))


@given(steps, steps, st.sampled_from(["layer_norm", "rms_norm"]))
@many
def test_norms_are_reparameterized_without_a_change(first: list[str], second: list[str], kind: str) -> None:
    def norm(b: Builder, x: Node) -> Node:
        rest = [b.random(CHANNELS), b.random(CHANNELS)] if kind == "layer_norm" else [b.random(CHANNELS)]
        return b.call(aten.layer_norm.default if kind == "layer_norm" else aten.rms_norm.default, x, [CHANNELS], *rest)

    before = composed(norm, first, second)
    after = shared_copy(before)
    plan = match(after)
    run_passes(after, [InsertObservers(plan, 1)])
    generator = torch.Generator().manual_seed(2)
    for group in norm_groups(plan):
        scale = torch.rand(CHANNELS, generator=generator) + 0.1
        zero_point = torch.rand(CHANNELS, generator=generator) * 9
        for site in group.sites:
            install(after, site, UniformQuantizer(scale, zero_point.round(), BITS))
        run_passes(after, [ReparameterizeNorms(group)])
    bypass(after, plan)
    assert outputs_differ(before, after) < 1e-4


def equalized(before: GraphModule) -> tuple[GraphModule, set[int]]:
    """With random bounds for every channel; and the labels that a shift was found for."""
    after = shared_copy(before)
    plan = match(after)
    equalizable = find_equalizable(after, plan)
    generator = torch.Generator().manual_seed(2)
    bounds = {}
    for name, pattern in equalizable.sites.items():
        low, size = (
            torch.randn(pattern.numel(), generator=generator),
            torch.rand(pattern.numel(), generator=generator) * 9,
        )
        bounds[name] = pattern.reshape(-1), Bounds(low, low + size + 0.1, size)
    equalization = equalize(bounds, equalizable.signed, equalizable.shiftable)
    return run_passes(after, [EqualizeLayers(equalizable, equalization)]), equalizable.shiftable


@given(steps, steps)
@many
def test_equalization_changes_nothing_in_float(first: list[str], second: list[str]) -> None:
    before = composed(lambda b, x: b.linear(x, CHANNELS), first, second)
    assert outputs_differ(before, equalized(before)[0]) < 1e-4


def attended(branch: list[str], fill: float) -> GraphModule:
    """Softmax of the products of queries and keys, the keys after some steps and some products filled."""
    b = Builder()
    x = b.input(2, 4, 4, CHANNELS)
    keys = b.linear(x, CHANNELS)
    for name in branch:
        keys = keys if math.prod(shape(keys)) > 2000 else STEPS[name](b, keys)
    queries, keys = (b.call(aten.reshape.default, each, [-1, CHANNELS]) for each in (b.linear(x, CHANNELS), keys))
    logits = b.call(aten.matmul.default, queries, b.call(aten.transpose.int, keys, 0, 1))
    mask = b.constant(torch.rand(shape(logits), generator=b.generator) < 0.3)
    logits = b.call(aten.masked_fill.Scalar, logits, mask, fill)
    return b.module(b.call(aten.softmax.int, logits, -1))


@given(steps, st.sampled_from([-1e9, -100.0, 0.0]))
@many
def test_keys_are_shifted_without_a_change(branch: list[str], fill: float) -> None:
    before = attended(branch, fill)
    assert outputs_differ(before, equalized(before)[0]) < 1e-4


def test_compositions_meet_both_kinds() -> None:
    assert equalized(attended(["roll", "mean"], -1e9))[1] and not equalized(attended(["pad", "roll"], -1e9))[1]
