"""Float models written as ONNX by torch itself: what evaluation must find equal to the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class _Chosen(nn.Module):
    """Some outputs of a transformers model, by name, as a tuple."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def chosen(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**inputs)
        return tuple(found[name] for name in self.outputs)


class _Ids(_Chosen):
    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return self.chosen(input_ids=input_ids)


class _Text(_Chosen):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.chosen(input_ids=input_ids, attention_mask=attention_mask)


class _TextAndImages(_Chosen):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.chosen(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)


def write_onnx(
    model: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: Sequence[str], free: Sequence[int] = (0, 1)
) -> str:
    """Export with these axes of the text free, of images the batch if it is; returns the path."""
    module = {1: _Ids, 2: _Text, 3: _TextAndImages}[len(inputs)](model, outputs).eval()
    shapes = {
        name: {axis: torch.export.Dim.DYNAMIC for axis in free if axis == 0 or tensor.ndim == 2}
        for name, tensor in inputs.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (),
            str(path),
            kwargs=inputs,
            dynamo=True,
            opset_version=21,
            dynamic_shapes=shapes if free else None,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
            external_data=False,
        )
    return str(path)
