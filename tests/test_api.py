"""The Python API inside a training script: DataLoaders for calibration, and a module that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import PLAIN
from helpers import images, redraw, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from repquant_fx import CompiledModel, Recipe, compile
from repquant_fx.errors import CalibrationError

FAST = Recipe(wbits=4, **PLAIN)


class Dicts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, name: str) -> None:
        self.name, self.data = name, images(12)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"labels": torch.tensor(index), self.name: self.data[index]}


class Bare(Dicts):
    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.data[index]


class Small(nn.Module):
    """The quickest model to compile that takes images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def small_compile(calibration: Any, **options: Any) -> CompiledModel:
    return compile(redraw(Small()), calibration, FAST, check=False, example_inputs=[images(2)], **options)


def loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=5)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "images and labels": lambda: loader(TensorDataset(images(12), torch.arange(12))),
    "images and dense targets": lambda: loader(TensorDataset(images(12), torch.randn(12, 5))),
    "images alone": lambda: loader(TensorDataset(images(12))),
    "bare tensors": lambda: loader(Bare("x")),
    "dicts": lambda: loader(Dicts("x")), "dicts under another name": lambda: loader(Dicts("pixel_values")),
}


@pytest.fixture(scope="module")
def expected() -> bytes:
    return small_compile([images(12)]).to_bytes()


@pytest.mark.parametrize("name", LOADERS)
def test_data_loaders(name: str, expected: bytes) -> None:
    result = small_compile(LOADERS[name]())
    assert not result.report["calibration"]["synthetic"]
    assert result.to_bytes() == expected  # the same samples, whatever they came in


def test_no_more_batches_are_read_than_needed() -> None:
    read = []

    class Counting(Dicts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            read.append(index)
            return super().__getitem__(index)

    small_compile(loader(Counting("x")), samples=5)
    assert read == [0, 1, 2, 3, 4]


def test_a_data_loader_of_something_else_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"batch 0.*expects shape"):
        compile(vit(depth=1), loader(TensorDataset(torch.randn(8, 7))), FAST)


def training_state(model: nn.Module) -> dict[str, Any]:
    return {"modes": [m.training for m in model.modules()], "grads": [p.requires_grad for p in model.parameters()],
            "hooks": [len(m._forward_hooks) for m in model.modules()]}


def test_between_two_steps_of_training() -> None:
    """Training with a compile in the middle gives the weights of training without."""
    def train(interrupt: bool) -> nn.Module:
        torch.manual_seed(3)
        model = vit(depth=1)
        model.train()
        model.patch_embed.eval()  # a part frozen, as in fine-tuning
        model.head.weight.requires_grad_(False)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for step in range(4):
            x = torch.randn(8, 3, 16, 16)
            loss = nn.functional.dropout(model(x), 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if interrupt and step == 1:
                before, weights, grads = (
                    training_state(model),
                    copy.deepcopy(model.state_dict()),
                    [p.grad for p in model.parameters()],
                )
                result = compile(model, loader(TensorDataset(images(12), torch.arange(12))), FAST)
                assert training_state(model) == before and model.training and not model.patch_embed.training
                assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values()))
                assert all(p.grad is g for p, g in zip(model.parameters(), grads))
                (logits,) = result.session().run(None, {"x": images(4).numpy()})
                assert logits.shape == (4, 5)
                reference = [p.detach().clone() for p in result.graph_module.parameters()]
        if interrupt:  # what was compiled does not follow the training
            assert all(torch.equal(a, b) for a, b in zip(reference, result.graph_module.parameters()))
        return model

    for a, b in zip(train(False).parameters(), train(True).parameters()):
        assert torch.equal(a, b)


def test_a_failure_leaves_the_module_as_it_was_too() -> None:
    model = vit(depth=1).train()
    with pytest.raises(CalibrationError):
        compile(model, torch.zeros(3), FAST)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: copy.deepcopy(m).to(torch.bfloat16)],
    ids=["parallel", "compiled", "bfloat16"],
)
def test_wrapped_and_narrow_modules(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = vit(depth=1)
    wrapped = wrap(model)
    dtypes = [p.dtype for p in wrapped.parameters()]
    result = compile(wrapped, images(12), FAST, check=False)
    assert [p.dtype for p in wrapped.parameters()] == dtypes
    paths = [layer["path"] for layer in result.report["layers"]]
    assert "blocks.0.attn.qkv" in paths


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_module_on_a_gpu() -> None:
    model = vit(depth=1).cuda()
    data = [(images(12)[i:i + 4].cuda(), torch.arange(4).cuda()) for i in (0, 4, 8)]
    result = compile(model, [x for x, _ in data], FAST)
    assert (
        next(model.parameters()).is_cuda and result.to_bytes() == compile(vit(depth=1), [images(12)], FAST).to_bytes()
    )
