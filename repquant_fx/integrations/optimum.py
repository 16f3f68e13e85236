"""A quantizer in the form of optimum's `ORTQuantizer`: `from_pretrained`, then `quantize(save_dir)`.

The directory that it writes is loaded by optimum's `ORTModelFor...` classes. It begins at the transformers model, not
at an ONNX file: what is rewritten are the constants of the float model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer

from repquant_fx.compiler import compile
from repquant_fx.errors import InputError
from repquant_fx.files import MODEL
from repquant_fx.recipe import Recipe, RecipeLike

_BITS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4}


class RepQuantizer(OptimumQuantizer):  # type: ignore[misc]
    """Quantizes one transformers model.

        quantizer = RepQuantizer.from_pretrained("path/to/bert")
        quantizer.quantize("bert-int8/", dataset=dataset)
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options

    @classmethod
    def from_pretrained(cls, model_or_path: Any, file_name: str | None = None, **options: Any) -> RepQuantizer:
        """
        Args:
            model_or_path: a transformers model, its directory, or `hf:OWNER/NAME`, which is downloaded.
            file_name: of an ONNX file, which is refused.
            options: of `repquant_fx.compile`, such as `task`.

        Raises:
            InputError: an ONNX file is given.
        """
        if file_name is not None or str(model_or_path).endswith(".onnx"):
            raise InputError(f"{file_name or model_or_path} is an ONNX model; give the transformers model that it was "
                             "exported from, or its directory")
        return cls(model_or_path, **options)

    def quantize(
        self, save_dir: str | Path, file_prefix: str | None = None, quantization_config: Any = None,
        dataset: Any = None, num_samples: int | None = None, **options: Any,
    ) -> Path:
        """Compile, and write a directory.

        Args:
            save_dir: gets `model.onnx`, the configuration and the tokenizer.
            file_prefix: not supported, as the file's name is the one that optimum looks for.
            quantization_config: a recipe, a mapping or file that says one, or a configuration of optimum for static
                quantization, of which the bits are taken. RepQuant at W8A8 where None.
            dataset: of `datasets`, with columns named as the model's inputs; or what `compile` takes.
            num_samples: of it, at most.
            options: of `repquant_fx.compile`.

        Returns:
            where the model was written.

        Raises:
            InputError, ParityError: as `compile` does; or a configuration that asks for dynamic quantization.
        """
        if file_prefix is not None:
            raise InputError(f"file_prefix {file_prefix!r}: the file is always called {MODEL}")
        compiled = compile(self.model, columns(dataset), recipe_of(quantization_config), samples=num_samples,
                           **{**self.options, **options})
        return compiled.save(save_dir, force=True)


def recipe_of(config: Any) -> RecipeLike | None:
    """A recipe as it is; of a configuration of optimum its bits.

    Raises:
        InputError: it asks for dynamic quantization, or for types of other than 4 and 8 bits.
    """
    if config is None or isinstance(config, (Recipe, str, Path, Mapping)):
        return config
    if not getattr(config, "is_static", False):
        raise InputError("the configuration asks for dynamic quantization, which this compiler does not do: set "
                         "is_static=True, or give a repquant_fx.Recipe")
    bits = []
    for name in ("weights_dtype", "activations_dtype"):
        kind = getattr(config, name, None)
        text = str(getattr(kind, "name", kind)).upper().removeprefix("Q")
        if text not in _BITS:
            raise InputError(f"the configuration's {name} is {kind}; expected one of 4 or 8 bits")
        bits.append(_BITS[text])
    return Recipe(wbits=bits[0], abits=bits[1])


def columns(dataset: Any) -> Any:
    """The numeric columns of a data set as tensors by name; anything else as it is."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list):
        return dataset
    found = {}
    for name in names:
        values = dataset[name]
        first = next(iter(values), None)
        listed = isinstance(first, Iterable) and not isinstance(first, str)
        if listed or isinstance(first, (int, float, torch.Tensor)):
            found[name] = torch.stack([torch.as_tensor(value) for value in values])
    return found
