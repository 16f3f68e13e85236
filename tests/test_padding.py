"""What a model computes at padded tokens takes no part in calibration."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import relative
from language import VOCABULARY, make
from torch import Tensor, nn

from repquant_fx.frontends.capture import Captured, capture
from repquant_fx.options import Source
from repquant_fx.parity import sqnr
from repquant_fx.passes.base import run_pass, run_passes, shared_copy
from repquant_fx.passes.insert_observers import InsertObservers
from repquant_fx.passes.install_decision import installed_weights
from repquant_fx.passes.match_sites import MatchSites
from repquant_fx.passes.normal_form import normalize
from repquant_fx.pipeline import equalize_layers, quantize_sequentially, reconstruct, rotate
from repquant_fx.pipeline.padding import Padding, find_padding
from repquant_fx.preparation import Matched, match
from repquant_fx.quantizers.observers import Observer
from repquant_fx.recipe import Recipe
from repquant_fx.report import layer_sqnr
from repquant_fx.sensitivity import sensitivity

Batches = list[tuple[Tensor, Tensor]]
QUICK = {"clipping": "none", "activations": "minmax", "weights": "minmax"}


@functools.cache
def matched(name: str) -> Matched:
    return match(Source(make(name)))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pads(*shape: int) -> Tensor:
    return torch.full(shape, 2)


def wild(*shape: int) -> Tensor:
    return ids(*shape, seed=99)


def padded(lengths: list[list[int]], filler: Callable[..., Tensor], *, left: bool = False) -> Batches:
    """One batch for each list; `filler` gives what stands at padded positions."""
    batches, longest = [], max(n for batch in lengths for n in batch)
    places = torch.arange(longest)
    for number, batch in enumerate(lengths):
        rows = torch.tensor(batch)[:, None]
        mask = places >= longest - rows if left else places < rows
        tokens = filler(*mask.shape)
        for row, n in enumerate(batch):
            tokens[row, mask[row]] = ids(1, n, seed=10 * number + row)[0]
        batches.append((tokens, mask.long()))
    return batches


def decisions(name: str, batches: Batches, recipe: Recipe) -> dict[str, Tensor]:
    """All that a compile decides, by name."""
    graph_module = shared_copy(matched(name).graph_module)
    plan, padding = run_pass(graph_module, MatchSites(recipe)), find_padding(graph_module, batches)
    found = {f"rotation {i}": torch.tensor([trial.before, trial.after])
             for i, trial in enumerate(rotate(graph_module, plan, batches, recipe)) if not trial.candidate.reason}
    plan = equalize_layers(graph_module, plan, batches, recipe, padding=padding)
    float_graph = shared_copy(graph_module)
    run_passes(graph_module, [InsertObservers(plan, len(batches))])
    quantized = quantize_sequentially(graph_module, plan, batches, recipe, padding=padding)
    blocks = reconstruct(graph_module, float_graph, plan, quantized, batches, recipe.reconstruct, 0, padding=padding)
    found |= {f"block {i}": torch.tensor([*block.own, *block.feature]) for i, block in enumerate(blocks)}
    weights = installed_weights(graph_module, plan)
    for consumer, weight in weights.items():
        found |= {f"{consumer.name} codes": weight.codes, f"{consumer.name} scale": weight.scale}
    slots = {name: module for name, module in graph_module.named_modules() if not isinstance(module, Observer)}
    found |= {f"{name} {part}": value for name, module in slots.items() for part, value in
              module.named_buffers(recurse=False) if part in ("scale", "zero_point")}
    found["biases"] = torch.cat([b.flatten() for n, b in sorted(graph_module.named_buffers()) if n.endswith("bias")])
    names = [consumer.name for consumer in weights]
    found["report"] = torch.tensor(list(layer_sqnr(float_graph, graph_module, names, batches[0]).values()))
    return found


@pytest.mark.parametrize("name, left, changes", [
    ("bert", False, {"rotate": ("heads",), "reconstruct": 2}),
    ("llama", True, {"rotate": ("residual", "heads")}),
    ("opt", True, {}),
])
def test_what_stands_at_padded_positions_changes_nothing(name: str, left: bool, changes: dict[str, object]) -> None:
    lengths = [[3, 7, 5], [9, 2, 4]]
    recipe = Recipe(wbits=4, abits=4, **changes)  # type: ignore[arg-type]
    plain = decisions(name, padded(lengths, pads, left=left), recipe)
    other = decisions(name, padded(lengths, wild, left=left), recipe)
    assert plain.keys() == other.keys()
    assert [key for key in plain if not torch.equal(plain[key], other[key])] == []


@pytest.mark.parametrize("name, left", [("bert", False), ("opt", True)])
def test_padding_gives_what_the_sequences_give_alone(name: str, left: bool) -> None:
    """Up to float rounding, where nothing is left out of a sample."""
    lengths = [[6, 6], [9, 9], [4, 4]]
    recipe = Recipe(wbits=8, abits=8, gptq=False, softmax_scale="percentile", **QUICK)  # type: ignore[arg-type]
    batches = padded(lengths, pads, left=left)
    unpadded = [(tokens[mask > 0].reshape(2, -1), mask[mask > 0].reshape(2, -1)) for tokens, mask in batches]
    assert [len(tokens[0]) for tokens, _ in unpadded] == [6, 9, 4]
    together, alone = decisions(name, batches, recipe), decisions(name, unpadded, recipe)
    for key in together:
        found, expected = together[key].double(), alone[key].double()
        if key.endswith("codes") or key.endswith("zero_point"):
            assert float((found - expected).abs().max()) <= 1 and float((found != expected).double().mean()) < 0.01, key
        else:
            assert relative(found, expected) < 1e-4, key


def test_sensitivity_does_not_depend_on_padding() -> None:
    found = []
    for filler in (pads, wild):
        tokens, mask = (torch.cat(parts) for parts in zip(*padded([[3, 7, 5], [9, 2, 4]], filler)))
        recipe = Recipe(wbits=4, abits=4, softmax_scale="percentile", **QUICK)  # type: ignore[arg-type]
        analysed = sensitivity(make("bert"), {"input_ids": tokens, "attention_mask": mask}, recipe, probes=1)
        found.append([(unit.name, unit.damage, unit.sqnr_db) for unit in analysed.units])
    assert found[0] == found[1]


def outer(mask: Tensor) -> Tensor:
    return mask[:, None, :, None] & mask[:, None, None, :]


@pytest.mark.parametrize("name, node, expected", [
    ("bert", "layer_norm", lambda m: m[..., None]),
    ("bert", "mul", lambda m: m[:, None, :, None]),  # the queries
    ("bert", "transpose_3", lambda m: m[:, None, None, :]),  # the keys, turned
    ("bert", "transpose_2", lambda m: m[:, None, :, None]),  # the values
    ("bert", "softmax", outer),
    ("bert", "matmul_1", lambda m: m[:, None, :, None]),
    ("bert", "linear_5", lambda m: m[..., None]),
    ("bert", "linear_7", lambda m: None),  # of the first token
    ("llama", "add_4", lambda m: m[:, None, :, None]),  # queries that were rotated
    ("llama", "view_3", lambda m: m[:, None, :, None]),  # keys that two heads share
    ("llama", "softmax", outer),
    ("llama", "mul_76", lambda m: m[..., None]),
    ("opt", "layer_norm_1", lambda m: m.reshape(-1, 1)),  # rows of all samples
    ("opt", "linear_6", lambda m: m[..., None]),
    ("opt", "embedding_1", lambda m: None),  # positions
])
def test_what_counts(name: str, node: str, expected: Callable[[Tensor], Tensor | None]) -> None:
    graph_module = matched(name).graph_module
    batches = padded([[5, 2, 4], [5, 5]], pads)
    padding = find_padding(graph_module, batches)
    value = next(n for n in graph_module.graph.nodes if n.name == node).meta["val"]
    found, wanted = padding.counts(0, node), expected(batches[0][1].bool())
    assert padding.counts(1, node) is None  # nothing is padded in the second batch
    if wanted is None:
        assert found is None
    else:
        assert found is not None and found.ndim == value.ndim and torch.equal(found.expand(wanted.shape), wanted)


class Odd(nn.Module):
    """Heads in the batch, a mean over tokens, a convolution over them; every size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(self.table(tokens))
        heads = x.reshape(2, 4, 2, 4).transpose(1, 2).reshape(4, 4, 4)
        scores = torch.bmm(heads, heads.transpose(1, 2))
        mean = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        left, right = self.linear(torch.cat([x, x.flip(1)], 1)).split([3, 5], dim=1)
        return scores, mean, self.conv(x.transpose(1, 2)), left, right, x[:, 3]


@functools.cache
def odd() -> Captured:
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    return capture(Odd().eval(), (tokens, torch.ones_like(tokens)), dynamic_batch=False)


def test_what_counts_where_sizes_are_fixed_and_operators_are_odd() -> None:
    graph_module = normalize(odd().graph_module)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    padding = find_padding(graph_module, [(torch.zeros_like(mask), mask)])
    nodes = graph_module.graph.output_node().args[0]
    scores, mean, conv, left, right, last = (padding.counts(0, node.name) for node in nodes)  # type: ignore[union-attr]
    real = mask.bool()
    heads = real.repeat_interleave(2, 0)
    assert scores is not None and torch.equal(scores, heads[:, :, None] & heads[:, None, :])
    assert mean is None and conv is None
    both = torch.cat([real, real.flip(1)], 1)[..., None]
    assert left is not None and right is not None
    assert torch.equal(left, both[:, :3]) and torch.equal(right, both[:, 3:])
    assert last is None  # padded in every sample, and read all the same


def test_nothing_is_looked_for_where_nothing_is_padded() -> None:
    graph_module = matched("bert").graph_module
    assert find_padding(graph_module, padded([[4, 4]], pads)) == Padding()
    assert find_padding(matched("vit").graph_module, [(torch.zeros(2, 3, 16, 16),)]) == Padding()


def test_noise_at_padded_positions_is_none() -> None:
    exact, counts = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])[..., None]
    found = torch.where(counts, exact * 1.1, torch.inf)
    assert sqnr(found, exact, counts) == pytest.approx(20, abs=1e-3) and sqnr(found, exact) < 10
