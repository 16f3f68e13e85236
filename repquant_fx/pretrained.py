"""A model by name, compiled, as a module that is called like the one that it stands for."""

from __future__ import annotations

import re
from typing import Any

from repquant_fx import compiler
from repquant_fx.compiled_module import CompiledModule
from repquant_fx.errors import InputError
from repquant_fx.frontends.architectures import is_architecture
from repquant_fx.frontends.loading import load_source
from repquant_fx.options import from_keywords
from repquant_fx.recipe import RecipeLike

_OF_LOADING = ("arch", "input_shape", "allow_pickle", "task", "offload_dir")


def from_pretrained(
    source: str,
    calibration: Any = None,
    recipe: RecipeLike | None = None,
    *,
    threads: int | None = None,
    **options: Any,
) -> CompiledModule:
    """Load a model, compile it, and run the compiled file in its place.

        model = repquant_fx.from_pretrained("timm:vit_small_patch16_224", "images/")
        logits = model(pictures)
        model.save_pretrained("vit/")

    Args:
        source: `timm:NAME` or `torchvision:NAME`, whose published weights are downloaded unless it says
            `pretrained=False`; `hf:OWNER/NAME`, which is downloaded, too; a transformers directory, or a file. See
            `compiler.compile`.
        calibration, recipe, options: see `compiler.compile`.
        threads: of ONNX Runtime; its default where None.

    Returns:
        a module that takes what the model takes. `.compiled` is what `compile` gives, `.original` the float model.

    Raises:
        InputError, ParityError: as `compile` does. A program of torch.export is no module: InputError.
    """
    wanted, _ = from_keywords(with_weights(source), None, {k: v for k, v in options.items() if k in _OF_LOADING})
    loaded = load_source(wanted)
    if loaded.module is None:
        raise InputError(
            f"{loaded.source} is a program, not a module that another can stand for: use compile and its session"
        )
    rest = {name: value for name, value in options.items() if name not in _OF_LOADING or name == "offload_dir"}
    compiled = compiler.compile(loaded, calibration, recipe, **rest)
    return CompiledModule(loaded.module, compiled, threads).eval()


def with_weights(source: str) -> str:
    """An architecture with its published weights, unless it says something else about them."""
    if is_architecture(source) and not re.search(r",\s*pretrained\b(?!_)", source):
        return f"{source},pretrained"
    return source
