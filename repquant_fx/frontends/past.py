"""Decoding with a key/value cache: a causal language model of transformers as a function of flat tensors.

Inputs are `input_ids`, `attention_mask` over old and new tokens, `position_ids` where the model takes them (padding in
front is not counted then), and for each layer the keys and values of the old tokens; outputs are the logits of the new
tokens, and the keys and values of old and new ones. What a layer keeps is read off the cache that one run on examples
fills; no model is known by name.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from repquant_fx.errors import InputError, first_line
from repquant_fx.frontends.signature import is_transformers, stateless

if TYPE_CHECKING:
    from repquant_fx.frontends.loading import LoadedModel

TASK = "causal-lm"
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
LEAST = {TOTAL: 4}  # torch traces for two old and two new tokens at least; the graph serves any number
_INPUTS, _OUTPUTS = "past_key_values", "present"
_SEED = 1


class NoCacheError(InputError):
    """The model keeps no cache that flat tensors could hold."""


@dataclass(frozen=True)
class Past:
    """What a decoder takes beside the ids and the mask.

    Attributes:
        shapes: of the keys and the values of each layer, without batch and tokens: (heads, size of a head).
        positions: whether it takes `position_ids`.
    """

    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    positions: bool
    given = 2  # inputs that the others follow from

    def names(self) -> list[str]:
        """Of the caches in a file: `past_key_values.0.key`, `past_key_values.0.value`, ..."""
        return [f"{_INPUTS}.{i}.{kind}" for i in range(len(self.shapes)) for kind in ("key", "value")]

    def caches(self, batch: int, tokens: int = 0, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Keys and values of so many old tokens, random numbers; shape (batch, heads, tokens, size), float32."""
        return tuple(torch.randn(batch, heads, tokens, size, generator=generator)
                     for layer in self.shapes for heads, size in layer)

    def complete(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All inputs of whole sequences: (ids, mask) and what follows from them; nothing is old."""
        ids, mask = batch
        return (ids, mask, *([positions_of(mask)] if self.positions else []), *self.caches(len(ids)))


def positions_of(mask: Tensor) -> Tensor:
    """Positions of the tokens by their attention mask, (batch, tokens) int64: padding is not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def output_name(name: str) -> str:
    """`present.0.key` of `past_key_values.0.key`."""
    return _OUTPUTS + name.removeprefix(_INPUTS)


def is_cache(name: str) -> bool:
    """Whether an input of a file holds keys or values of old tokens."""
    return name.startswith(f"{_INPUTS}.")


def may_decode(loaded: LoadedModel) -> bool:
    """Whether a model is a causal language model of transformers, and whole."""
    return loaded.task == TASK and loaded.part is None and is_transformers(loaded.module)


def as_decoder(loaded: LoadedModel) -> LoadedModel:
    """The same model as one that decodes with a cache; the module given is left as it is.

    Raises:
        NoCacheError: no causal language model of transformers, or one whose cache is no pair of keys and values in
            each layer.
    """
    if not may_decode(loaded) or loaded.input_names is None:
        raise NoCacheError("only causal language models of transformers decode with a cache")
    names, inputs = list(loaded.input_names), dict(zip(loaded.input_names, loaded.example_inputs))
    if names != ["input_ids", "attention_mask"]:
        raise NoCacheError(f"a decoder takes input_ids and attention_mask; this model takes {', '.join(names)}")
    model = stateless(cast(nn.Module, loaded.module))
    vars(cast(Any, model).config)["use_cache"] = True  # written beside the file
    ids = inputs["input_ids"]
    old = ids.shape[1] // 4
    if old < 2:
        raise NoCacheError(f"its sequences have {ids.shape[1]} tokens at most")
    past = Past(_shapes(model, ids), "position_ids" in inspect.signature(model.forward).parameters)
    tokens: dict[str, tuple[Tensor, dict[int, str]]] = {
        "input_ids": (ids[:, old:].contiguous(), {0: BATCH, 1: SEQUENCE}),
        "attention_mask": (inputs["attention_mask"], {0: BATCH, 1: TOTAL}),
    }
    if past.positions:
        tokens["position_ids"] = positions_of(inputs["attention_mask"])[:, old:].contiguous(), {0: BATCH, 1: SEQUENCE}
    caches = past.caches(len(ids), old, torch.Generator().manual_seed(_SEED))
    free, taken = ({0: BATCH, 2: PAST},) * len(caches), (*tokens, *(n.replace(".", "_") for n in past.names()))
    model.forward = types.MethodType(_decoder(cache_parameter(model), taken, len(tokens)), model)  # type: ignore[method-assign]
    return replace(loaded, module=model, past=past, input_names=taken,
                   example_inputs=(*(tensor for tensor, _ in tokens.values()), *caches),
                   dynamic_axes=(*(axes for _, axes in tokens.values()), *free))


def _decoder(called: str, names: Sequence[str], tokens: int) -> Callable[..., dict[str, Tensor]]:
    """What becomes of a model's `forward`: it takes tensors called `names`, all but the first `tokens` of them as the
    keys and values of the layers. They need not be given back: they are what the new ones are appended to.

    Args:
        called: the parameter of the model that takes the cache.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    def forward(self: Any, **inputs: Tensor) -> dict[str, Tensor]:
        cache, flat = DynamicCache(), [inputs[name] for name in names[tokens:]]
        for keys, values in zip(flat[::2], flat[1::2]):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # it begins with a Concat of nothing otherwise
            cache.layers.append(layer)
        given = {name: inputs[name] for name in names[:tokens]}
        return {"logits": type(self).forward(self, **given, **{called: cache}, use_cache=True).logits}

    named = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
             *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names)]
    vars(forward)["__signature__"] = inspect.Signature(named)  # torch.export names its inputs by it
    return forward


def cache_parameter(model: nn.Module) -> str:
    """transformers calls it `cache`, and called it `past_key_values`."""
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), None)
    if name is None:
        raise NoCacheError(f"{type(model).__name__} takes no cache")
    return name


@torch.no_grad()
def _shapes(model: nn.Module, ids: Tensor) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    """Heads and their sizes of each layer's keys and values.

    Raises:
        NoCacheError: it keeps something else, or nothing.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    try:
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        cache = result["cache"] if "cache" in result else result["past_key_values"]
    except Exception as error:
        raise NoCacheError(f"it does not run with a cache: {first_line(error)}") from error
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, DynamicCache) or not layers:
        raise NoCacheError(f"its cache is a {type(cache).__name__}")
    for layer in layers:
        if not isinstance(layer, DynamicLayer):
            raise NoCacheError(f"a layer of it keeps a {type(layer).__name__}, not keys and values")
        if any(not isinstance(t, Tensor) or t.ndim != 4 or len(t) != len(ids) for t in (layer.keys, layer.values)):
            raise NoCacheError("a layer of it keeps keys and values of other shapes than (batch, heads, tokens, size)")
    return tuple((_shape(layer.keys), _shape(layer.values)) for layer in layers)


def _shape(value: Tensor) -> tuple[int, int]:
    return value.shape[1], value.shape[3]
