"""Post-training quantization of transformers by scale reparameterization: torch.fx in, ONNX QDQ out.

The public API: `compile`, `compile_in_place`, `from_pretrained`, `CompiledModel`, `Recipe`, `LayerRule`, `repq_vit`,
`smoothquant`, `rtn`, `tune`, the errors, and `session` to run a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repquant_fx.version import VERSION as __version__

if TYPE_CHECKING:
    from repquant_fx.compiled import CompiledModel
    from repquant_fx.compiler import compile
    from repquant_fx.errors import InputError, ParityError, RepQuantError
    from repquant_fx.in_place import compile_in_place
    from repquant_fx.pretrained import from_pretrained
    from repquant_fx.recipe import LayerRule, Recipe, repq_vit, rtn, smoothquant
    from repquant_fx.runtime import session
    from repquant_fx.tuning import tune

__all__ = [
    "CompiledModel",
    "InputError",
    "LayerRule",
    "ParityError",
    "Recipe",
    "RepQuantError",
    "__version__",
    "compile",
    "compile_in_place",
    "from_pretrained",
    "repq_vit",
    "rtn",
    "session",
    "smoothquant",
    "tune",
]

_HOMES = {
    "compile_in_place": "in_place", "from_pretrained": "pretrained",
    "compile": "compiler", "CompiledModel": "compiled", "Recipe": "recipe", "LayerRule": "recipe", "repq_vit": "recipe",
    "rtn": "recipe", "smoothquant": "recipe",
    "session": "runtime", "tune": "tuning", "InputError": "errors", "ParityError": "errors", "RepQuantError": "errors",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `repquant-fx --help` need not load torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"repquant_fx.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
