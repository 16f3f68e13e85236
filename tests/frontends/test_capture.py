"""Capture: the graph equals the model, whatever its attention masks; the model is left alone."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from helpers import Block, Encoder, count, images, output, redraw, relative, sequences, swin, vit
from torch import Tensor, nn

from repquant_fx.errors import CaptureError, RepQuantWarning
from repquant_fx.frontends.attention import decompose_attention
from repquant_fx.frontends.capture import AXES, capture
from repquant_fx.passes.normal_form import normalize

aten = torch.ops.aten


@pytest.mark.parametrize(
    "make, data",
    [(vit, images), (swin, images), (lambda: redraw(Encoder(causal=True)), sequences)],
    ids=["vit", "swin", "causal"],
)
def test_equals_eager_and_takes_other_batch_sizes(make, data) -> None:
    model, x = make(), data(7)
    captured = capture(model, [x[:2]])
    assert captured.dynamic_batch and captured.eager_difference < 1e-5
    assert captured.output_names == ["output"] and len(captured.input_names) == 1
    for size in (1, 3, 7):
        assert relative(output(captured.graph_module, x[:size]), output(model, x[:size])) < 1e-5


def test_attention_becomes_visible_operators() -> None:
    graph_module = capture(vit(), [images(2)]).graph_module
    assert count(graph_module, aten.scaled_dot_product_attention.default) == 0
    assert count(graph_module, aten.softmax.int, aten._softmax.default) == 2
    assert count(graph_module, aten.matmul.default, aten.bmm.default) == 4
    assert count(graph_module, aten.layer_norm.default) == 5


class MaskedAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv(heads: int = 2, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, h, 5, 4, generator=g) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_masks(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 1, 5, 5, generator=g) > 0.5
    mask[..., 0] = True
    mask = mask if kind == "boolean" else torch.randn(3, 1, 5, 5, generator=g)
    inputs = (*qkv(), mask)
    captured = capture(MaskedAttention(), inputs)
    assert captured.eager_difference < 1e-5
    # the mask is an input, not a constant
    flipped = (*qkv(), mask.flip(-1) if kind == "float" else mask | mask.flip(-2))
    assert relative(output(captured.graph_module, *flipped), MaskedAttention()(*flipped)) < 1e-5


def test_boolean_mask_hides_exactly() -> None:
    q, k, v = qkv()
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[..., 3:] = False
    other = v.clone()
    other[:, :, 3:] = 1e6
    assert torch.equal(decompose_attention(q, k, v, mask), decompose_attention(q, k, other, mask))
    mask[:, :, 2] = False  # a row that is hidden whole stays finite
    assert bool(torch.isfinite(decompose_attention(q, k, v, mask)).all())


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"enable_gqa": True, "is_causal": True}]
)
def test_attention_options(options: dict[str, object]) -> None:
    q, k, v = qkv(4, 2) if "enable_gqa" in options else qkv()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    assert relative(decompose_attention(q, k, v, **options), expected) < 1e-5  # type: ignore[arg-type]

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    graph_module = capture(Attention(), (q, k, v)).graph_module
    assert relative(output(graph_module, q[:1], k[:1], v[:1]), expected[:1]) < 1e-5


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_control_flow_is_named() -> None:
    lines, first = inspect.getsourcelines(Branching.forward)
    line = first + next(i for i, text in enumerate(lines) if "x.sum()" in text)
    with pytest.raises(CaptureError, match=rf"test_capture\.py:{line}\b"):
        capture(Branching(), [torch.ones(2, 3)])


def test_random_models_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(CaptureError, match="does not equal the model"):
        capture(Noisy(), [torch.ones(2, 3)])


def test_static_batch() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(6) * 2

    with pytest.warns(RepQuantWarning, match="dynamic batch"):
        assert not capture(Fixed(), [torch.ones(2, 3)]).dynamic_batch
    assert not capture(redraw(Block()), [torch.ones(1, 3, 16)]).dynamic_batch  # a batch of one stays one
    assert not capture(redraw(Block()), [torch.ones(2, 3, 16)], dynamic_batch=False).dynamic_batch


def test_exported_programs() -> None:
    model, x = redraw(Block(causal=True)), torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    dynamic = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    for program, expected in ((torch.export.export(model, (x,)), False), (dynamic, True)):
        captured = capture(program, [x])
        assert captured.dynamic_batch is expected and captured.eager_difference < 1e-5
    assert relative(output(captured.graph_module, x[:1]), output(model, x[:1])) < 1e-5


def test_the_model_is_left_alone() -> None:
    model = redraw(Encoder())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph_module = capture(model, [sequences(2)]).graph_module
    normalize(graph_module)
    # no copy is made
    assert {p.data_ptr() for p in graph_module.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in graph_module.parameters())
    assert not any(n.op == "call_module" for n in graph_module.graph.nodes)


def test_several_outputs_are_numbered() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return x * scale, x + 1

    captured = capture(Two(), [torch.ones(2, 3), torch.ones(2, 3)])
    assert captured.output_names == ["output_0", "output_1"] and captured.input_names == ["x", "scale"]


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    note: str | None = None


torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Named(nn.Module):
    """Inputs by name, in an order of the caller's; outputs in fields; a table of 9 positions bounds the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(10, 4), nn.Embedding(9, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None, extra: Tensor | None = None) -> Answer:
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        h = h if mask is None else h * mask[..., None]
        return Answer(h.sum(-1) + extra[:, None], (h, ids.sum(1)))


def named(batch: int, length: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    return {"mask": torch.rand(batch, length, generator=g), "extra": torch.rand(batch, generator=g),
            "ids": torch.randint(0, 10, (batch, length), generator=g)}


AXES_OF_NAMED = ({0: "batch", 1: "sequence"}, {0: "batch"}, {0: "batch", 1: "sequence"})


def test_inputs_by_name() -> None:
    model, example = redraw(Named()), named(2, 5)
    captured = capture(model, list(example.values()), input_names=list(example), dynamic_axes=AXES_OF_NAMED)
    assert captured.input_names == ["mask", "extra", "ids"] and captured.output_names == [
        "logits",
        "hidden.0",
        "hidden.1",
    ]
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    assert [node.target for node in placeholders] == captured.input_names
    assert tuple(node.meta[AXES] for node in placeholders) == AXES_OF_NAMED
    for size in ((1, 1), (3, 9), (4, 2)):
        inputs = named(*size)
        found, expected = captured.graph_module(*inputs.values()), model(**inputs)
        assert isinstance(found, tuple) and relative(found[0], expected.logits) < 1e-6
        assert relative(found[1], expected.hidden[0]) < 1e-6 and torch.equal(found[2], expected.hidden[1])


@pytest.mark.parametrize("wanted, names", [
    (["logits"], ["logits"]), (["hidden"], ["hidden.0", "hidden.1"]), (["hidden.1", "logits"], ["hidden.1", "logits"])])
def test_outputs_are_chosen(wanted: list[str], names: list[str]) -> None:
    model, example = redraw(Named()), named(2, 5)
    captured = capture(model, list(example.values()), input_names=list(example), outputs=wanted)
    assert captured.output_names == names and captured.input_names == ["mask", "extra", "ids"]
    if wanted == ["logits"]:
        assert isinstance(captured.graph_module(*example.values()), Tensor)
    with pytest.raises(CaptureError, match=r"no output 'scores'; it has logits, hidden\.0, hidden\.1"):
        capture(model, list(example.values()), input_names=list(example), outputs=["scores"])


def test_a_name_that_forward_does_not_take() -> None:
    with pytest.raises(CaptureError, match="Named takes no input called 'idz'; it takes ids, mask, extra"):
        capture(Named(), [torch.ones(2, 3)], input_names=["idz"])


def test_an_axis_that_cannot_be_free_is_named() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(3, 2)

    with pytest.warns(RepQuantWarning, match="does not allow a dynamic sequence; captured with a dynamic batch only"):
        captured = capture(Three(), [torch.ones(4, 3)], dynamic_axes=[{0: "batch", 1: "sequence"}])
    assert captured.graph_module.graph.find_nodes(op="placeholder")[0].meta[AXES] == {0: "batch"}
    assert captured.dynamic_batch and captured.graph_module(torch.ones(7, 3)).shape == (7, 2)


class Viewed(nn.Module):
    """A view of what attention gives: torch's order of memory allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 2, 8).transpose(1, 2)
        heads = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.o(heads.transpose(1, 2).view(*x.shape[:2], 16))


def test_a_view_of_attention_that_its_order_of_memory_allows() -> None:
    model, x = redraw(Viewed()), sequences(2)
    program = torch.export.export(model, (x,))
    for given in (model, program):
        graph_module = capture(given, [x]).graph_module
        assert relative(output(graph_module, x), output(model, x)) < 1e-5
    assert count(program.graph_module, aten.view.default) == 2 and relative(program.module()(x), model(x)) < 1e-6
