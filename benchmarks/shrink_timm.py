"""Transformers of timm at a small size (see `shrink`)."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Mapping
from typing import Any

from shrink import HEADS, LAYERS, SIDE, WIDTH, NotSmall, built, check_runs, said
from torch import Tensor, nn


def transformers_of_timm() -> dict[str, str]:
    """Names of timm whose file has or uses a class of attention or of a transformer, and the file."""
    import timm

    found = {}
    for name in timm.list_models():
        module = sys.modules[timm.model_entrypoint(name).__module__]
        classes = [key for key, each in vars(module).items() if isinstance(each, type) and issubclass(each, nn.Module)]
        if any(re.search("Attention(?!Pool)|(?<!Split)Attn|Transformer|MHSA", key) for key in classes):
            found[name] = module.__name__.rpartition(".")[2]
    return found


def small_timm(name: str) -> tuple[nn.Module, Tensor]:
    """The model, weights drawn anew, and two images.

    Raises:
        NotSmall: see there.
    """
    import timm

    from repquant_fx.frontends.architectures import example_inputs

    module: Any = sys.modules[timm.model_entrypoint(name).__module__]
    build, whys = module.build_model_with_cfg, []
    for widths, side, last in itertools.product((True, False), (SIDE, None), (1, LAYERS)):
        def smaller(cls: Any, variant: str, pretrained: bool, *rest: Any, w: bool = widths, s: int | None = side,
                    d: int = last, **given: Any) -> Any:
            return build(cls, variant, False, *rest, **{**given, **_arguments(cls, given, w, s, d)})

        module.build_model_with_cfg = smaller
        try:
            model = built(lambda: timm.create_model(name, pretrained=False))
            (images,) = example_inputs(model)
            check_runs(model, images)
            return model, images
        except Exception as error:
            whys.append(str(error) if isinstance(error, NotSmall) else said(error))
        finally:
            module.build_model_with_cfg = build
    raise NotSmall(whys[-1])


def _arguments(cls: Any, given: Mapping[str, Any], widths: bool, side: int | None, last: int) -> dict[str, Any]:
    """Smaller values of what a class takes, those that it is given and those that it has by default."""
    parameters = inspect.signature(cls).parameters
    values = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    found = {name: _smaller(name, value, widths, last) for name, value in {**values, **given}.items()}
    found = {name: value for name, value in found.items() if value is not _AS_IT_IS}
    if side is not None and "img_size" in parameters:
        found["img_size"] = side
    return {**found, "num_classes": 5} if "num_classes" in parameters else found


_AS_IT_IS = object()
_DEPTHS = re.compile(r"(^|_)(depths?|layers|num_layers|num_blocks)$|^d$")
_WIDTHS = re.compile(r"(^|_)(embed_dims?|dims?|width|channels|hidden_dims?)$")


def _smaller(name: str, value: Any, widths: bool, last: int) -> Any:
    """A smaller value of an argument, by its name; `_AS_IT_IS` for any other.

    Args:
        widths: make widths and heads small, too.
        last: layers of all stages but the first.
    """
    number = isinstance(value, int) and not isinstance(value, bool)
    numbers = isinstance(value, (tuple, list)) and value and all(
        isinstance(each, int) and not isinstance(each, bool) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: _smaller(each.name, getattr(value, each.name), widths, last)
                  for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **{key: each for key, each in fields.items() if each is not _AS_IT_IS})
    if isinstance(value, (tuple, list)) and value and dataclasses.is_dataclass(value[0]):
        return type(value)(_smaller(name, each, widths, last) for each in value)
    if _DEPTHS.search(name) and number:
        return min(value, LAYERS)
    if _DEPTHS.search(name) and numbers:
        return type(value)(min(each, LAYERS if i == 0 else last) for i, each in enumerate(value))
    if widths and name == "num_heads" and (number or numbers):
        return min(value, HEADS) if number else type(value)(min(each, HEADS) for each in value)
    if widths and _WIDTHS.search(name) and number:
        return min(value, WIDTH)
    if widths and _WIDTHS.search(name) and numbers:
        return type(value)(max(1, round(each / value[0])) * min(value[0], WIDTH) for each in value)
    return _AS_IT_IS
