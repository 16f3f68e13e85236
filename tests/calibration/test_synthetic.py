"""Inputs without data: seeded, within bounds, more like photographs than noise, and drawn from the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Encoder, Function, canonical, images, redraw
from language import VOCABULARY, make, tokenizer
from torch import Tensor, nn

from repquant_fx.calibration import synthetic
from repquant_fx.calibration.batching import CalibrationSet
from repquant_fx.calibration.class_prior import towards_classes
from repquant_fx.calibration.dead_leaves import dead_leaves, pink_noise
from repquant_fx.calibration.drawn_text import BUDGET, FEWEST, Frame, affordable, draw_text, random_tokens
from repquant_fx.calibration.text import frame_of
from repquant_fx.errors import RepQuantWarning
from repquant_fx.options import Calibration, Run, Source
from repquant_fx.preparation import prepare


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(seed: int = 0) -> nn.Module:
    return nn.Sequential(nn.Flatten(), redraw(nn.Linear(768, 4), seed))


def leaves(count: int, side: int = 16) -> Tensor:
    generator = seeded()
    return torch.stack([dead_leaves((3, side, side), generator) for _ in range(count)])


def prepared(model: nn.Module, *inputs: Tensor, work_dir: Path | None = None, **options: Any) -> CalibrationSet:
    source = Source(model, example_inputs=inputs or None)
    with pytest.warns(RepQuantWarning, match="no calibration data"):
        return prepare(source, Calibration(**options), run=Run(work_dir=work_dir)).data


def column(data: CalibrationSet, index: int = 0) -> Tensor:
    return torch.cat([batch[index] for batch in data.batches])


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 7, 30), (3, 1, 1)])
def test_leaves_are_pixels_and_seeded(shape: tuple[int, int, int]) -> None:
    first, same, other = (dead_leaves(shape, seeded(seed)) for seed in (1, 1, 2))
    assert first.shape == shape and first.dtype == torch.float32 and 0 <= float(first.min()) <= float(first.max()) <= 1
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_pink_noise_falls_with_the_frequency() -> None:
    power = torch.fft.rfft2(pink_noise((64, 32, 32), seeded(), slope=1.0)).abs().square().mean(0)[0]
    for low in (1, 2, 4, 8):
        assert 3 < float(power[low] / power[2 * low]) < 5.5


def spread_of_similarities(pixels: Tensor) -> float:
    """Standard deviation of the cosines between two different patches of an image."""
    patches = nn.functional.normalize(nn.functional.unfold(pixels, 4, stride=4).mT, dim=-1)
    different = ~torch.eye(patches.shape[1], dtype=torch.bool)
    return float((patches @ patches.mT)[:, different].std(1).mean())


def test_patches_differ_more_than_those_of_noise() -> None:
    assert spread_of_similarities((leaves(16) - 0.5) / 0.25) > 2 * spread_of_similarities(images(16))


def test_images_move_towards_all_classes() -> None:
    start = (leaves(12) - 0.5) / 0.5
    graph_module = canonical(classifier(), images())
    before = {name: p.clone() for name, p in graph_module.named_parameters()}
    low, high = -torch.ones(3, 1, 1), torch.ones(3, 1, 1)
    made = towards_classes(graph_module, start, low, high, seeded(), 4)
    assert torch.equal(made, towards_classes(graph_module, start, low, high, seeded(), 4))
    assert float(made.abs().max()) <= 1 and not made.requires_grad
    with torch.no_grad():
        scores, earlier = graph_module(made), graph_module(start)
    assert len(scores.argmax(1).unique()) == 4
    assert float(scores.softmax(1).amax(1).mean()) > 0.2 + float(earlier.softmax(1).amax(1).mean())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in graph_module.named_parameters())


def test_a_module_is_left_as_it_was() -> None:
    model = classifier().train()
    data = prepared(model, images(2), samples=9, batch_size=4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert data.synthetic and "9 of them moved" in data.origin and column(data).shape == (9, 3, 16, 16)
    assert torch.equal(column(data), column(prepared(classifier(), images(2), samples=9, batch_size=4)))
    assert not torch.equal(column(data), column(prepared(classifier(), images(2), samples=9, batch_size=4, seed=1)))


@pytest.mark.parametrize("last, reason", [
    (lambda scores: (scores > 0).float(), "it cannot be differentiated"),
    (lambda scores: scores[:, None], "it gives no scores of classes"),
])
def test_what_cannot_be_moved_stays_dead_leaves(last: Callable[[Tensor], Tensor], reason: str) -> None:
    model = nn.Sequential(classifier(), Function(last))
    with pytest.warns(RepQuantWarning, match=reason):
        data = prepare(Source(model, example_inputs=(images(2),)), Calibration(samples=4)).data
    mean, deviation = synthetic.mean_and_deviation(None, 3)
    assert torch.equal(column(data), (leaves(4) - mean) / deviation)


def test_large_models_move_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_BUDGET", 1.0)
    assert f"{synthetic._FEWEST} of them moved" in prepared(classifier(), images(2), samples=20).origin


def test_kept_in_the_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(classifier(), images(2), work_dir=tmp_path, samples=4)
    assert len(list(tmp_path.glob("*/inputs.safetensors"))) == 1

    def fails(*_: object) -> Tensor:
        raise AssertionError("made again")

    monkeypatch.setattr(synthetic, "_make", fails)
    again = prepared(classifier(), images(2), work_dir=tmp_path, samples=4)
    assert torch.equal(column(first), column(again)) and again.origin == first.origin
    for changes in ({"seed": 1}, {"samples": 5}):
        with pytest.raises(AssertionError, match="made again"):
            prepare(Source(classifier(), example_inputs=(images(2),)), Calibration(**{"samples": 4, **changes}),
                    run=Run(work_dir=tmp_path))
    with pytest.raises(AssertionError, match="made again"):
        prepare(Source(classifier(1), example_inputs=(images(2),)), Calibration(samples=4), run=Run(work_dir=tmp_path))


def test_other_inputs_are_noise_as_before() -> None:
    data = prepared(redraw(Encoder()), torch.randn(2, 6, 8), samples=200)
    assert torch.equal(column(data), torch.randn(200, 6, 8, generator=seeded())) and data.origin.startswith("random")


# ---- text ------------------------------------------------------------------------------------------------------------


def successor(ids: Tensor) -> Tensor:
    """Logits of a model that goes on with the next id of ten."""
    return 60.0 * nn.functional.one_hot((ids + 1) % 10, 10).float()


@pytest.mark.parametrize("fixed", [False, True])
def test_text_is_what_the_model_says(fixed: bool) -> None:
    ids = draw_text(successor, 5, 12, (3,), seeded(), 10, 2, fixed)
    assert ids.dtype == torch.int64 and ids.tolist() == [[(3 + i) % 10 for i in range(12)]] * 5
    free = draw_text(successor, 40, 4, (), seeded(), 10, 16, fixed)
    assert len(free[:, 0].unique()) > 5 and bool((free.diff(dim=1) % 10 == 1).all())
    assert draw_text(successor, 2, 1, (3, 4), seeded(), 10, 2, fixed).tolist() == [[3]] * 2


def test_tokens_are_as_frequent_as_the_model_says() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.2, 0.0])
    ids = draw_text(lambda x: wanted.log().expand(*x.shape, 4), 200, 40, (0,), seeded(), 4, 64)
    torch.testing.assert_close(ids[:, 1:].flatten().bincount(minlength=4) / (200 * 39), wanted, atol=0.02, rtol=0)


def test_the_work_is_bounded() -> None:
    assert affordable(128, 2048, 1e6) == (128, 128) and affordable(20, 16, 1e6) == (20, 16)
    for flops in (1e8, 1e9, 1e10):
        count, length = affordable(128, 128, flops)
        assert count == FEWEST or count * length**2 / 2 * flops <= BUDGET


@pytest.mark.slow
def test_a_causal_language_model_draws_its_text() -> None:
    model = make("llama")
    first = prepared(model, samples=6, seq_len=9)
    ids, mask = column(first), column(first, 1)
    assert "drew itself" in first.origin and ids.shape == mask.shape == (6, 9) and bool((mask == 1).all())
    assert set(ids[:, 0].tolist()) == {0} and int(ids.max()) < VOCABULARY  # begins as the configuration says
    assert not torch.equal(ids, column(prepared(model, samples=6, seq_len=9, seed=1)))


def test_an_encoder_gets_tokens_of_its_vocabulary() -> None:
    data = prepared(make("bert"), samples=6, seq_len=9, tokenizer=tokenizer())
    ids = column(data)
    assert set(ids[:, 0].tolist()) == {0} and int(ids[:, 1:].min()) > 3 and int(ids.max()) < VOCABULARY
    assert "random tokens" in data.origin and bool((column(data, 1) == 1).all())


def test_the_frame_of_a_tokenizer() -> None:
    words = tokenizer()
    words.unk_token = None  # else the letter, which is no word of this one, counts as special
    assert frame_of(words).begin == (0,) and frame_of(words).end == ()
    ids = random_tokens(50, 6, Frame((7,), (8, 9), frozenset({7, 8, 9})), 12, seeded())
    assert ids[:, [0, 4, 5]].tolist() == [[7, 8, 9]] * 50 and not {7, 8, 9} & set(ids[:, 1:4].flatten().tolist())
    assert random_tokens(2, 3, Frame((7,), (8, 9)), 12, seeded()).shape == (2, 3)  # no room for a word within


def test_images_and_text_together() -> None:
    data = prepared(make("clip"), samples=4)
    assert "images of dead leaves and random tokens" in data.origin
    shapes = sorted(tuple(t.shape[2:]) for t in data.batches[0])
    assert (16, 16) in shapes and all(len(t) == 4 for t in data.batches[0])
