"""Models of transformers at a small size (see `shrink`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shrink import (HEADS, INNER, LAYERS, POSITIONS, SIDE, TOKENS, VOCABULARY, WIDTH, NotSmall, built, check_runs, said)
from torch import Tensor, nn

# name of a number in a configuration, and the largest that it may be
_NUMBERS = (
    (r"(^|_)(n_|num_)?(hidden_)?(layers?|blocks|depth)$|^n_layer$|_layers$", LAYERS),
    (r"vocab_size$|^vocabulary_size$", VOCABULARY),
    (r"max_(position_embeddings|source_positions|target_positions|seq_len\w*)$|^n_positions$|^n_ctx$", POSITIONS),
    (r"(heads|n_head|head_count)$|^num_key_value_heads$", HEADS),
    (r"head_dim$|^d_kv$|_head_size$", WIDTH // HEADS),
    (r"intermediate_size$|ffn_dim$|^d_ff$|mlp_dim$|^n_inner$|ffn_hidden_size$", INNER),
    (r"hidden_size$|^d_model$|^n_embd$|embed_dim$|embedding_size$|projection_dim$|hidden_dim$|^dim$|_dim$", WIDTH),
    (r"image_size$|^img_size$", SIDE),
    (r"^num_(local_)?experts$|^n_routed_experts$|^moe_num_experts$", 4),
    (r"experts_per_tok$|^moe_topk$", 2),
    (r"_token_id$|_token_index$", 3),
)
_WIDTHS = re.compile(r"embed_dim|hidden_sizes|depths|num_heads|embed_dims|_dims$")


def architectures_of_transformers() -> dict[str, str]:
    """Types of models that have a general class, and the folder that their code is in."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    mapping = transformers.AutoModel._model_mapping
    return {kind: model_type_to_module_name(kind) for kind in mapping._model_mapping if kind in mapping._config_mapping}


def small_transformers(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, weights drawn anew, and inputs by name, two of each.

    Raises:
        NotSmall: see there.
    """
    import transformers

    mapping, why = transformers.AutoModel._model_mapping, "no configuration"
    config_class: Any = transformers.CONFIG_MAPPING[kind]
    for dropped in (("layer_types",), ()):
        try:
            config = config_class.from_dict(smaller(config_class().to_dict(), dropped))
            if hasattr(config, "use_cache"):
                config.use_cache = False
            found = mapping[type(config)]
            cls = found[0] if isinstance(found, (tuple, list)) else found
            torch.manual_seed(0)
            model = built(lambda: cls(config))  # noqa: B023
            return model, _first_that_runs(model, config)
        except NotSmall:
            raise
        except Exception as error:
            why = said(error)
    raise NotSmall(why)


def smaller(config: dict[str, Any], dropped: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same configuration, and those in it, with small numbers."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in dropped:
            continue
        if isinstance(value, dict):
            found[name] = smaller(value, dropped) if name.endswith("config") else value
        elif isinstance(value, (tuple, list)) and _WIDTHS.search(name) and all(isinstance(v, int) for v in value):
            found[name] = [_least(name, each, index) for index, each in enumerate(value)]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((m for pattern, m in _NUMBERS if re.search(pattern, name)), None)
            found[name] = value if most is None else min(value, most)
        else:
            found[name] = value
    return found


def _least(name: str, value: int, index: int) -> int:
    if "depth" in name:
        return min(value, LAYERS if index == 0 else 1)
    return min(value, HEADS) if "heads" in name else min(value, WIDTH)


def _first_that_runs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Inputs that the model runs on.

    Raises:
        NotSmall: it runs on none.
    """
    takes, why = inspect.signature(model.forward).parameters, "it takes none of the inputs that are made up"
    for inputs in _inputs(config):
        if set(inputs) <= set(takes):
            try:
                check_runs(model, inputs)
                return inputs
            except Exception as error:
                why = said(error)
    raise NotSmall(why)


def _inputs(config: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs as models of text, images and sound take them."""
    from types import SimpleNamespace

    from repquant_fx.frontends.architectures import config_image_shape

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 1, (2, TOKENS), generator=generator)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape: Callable[..., Any] = lambda size: torch.randn(size, generator=generator)  # noqa: E731
    pixels = {"pixel_values": shape((2, *(config_image_shape(SimpleNamespace(config=config)) or (3, SIDE, SIDE))))}  # type: ignore[arg-type]
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    frames = 2 * getattr(config, "max_source_positions", POSITIONS)
    decoder = {"decoder_input_ids": ids}
    yield from (text | decoder, text, {"input_ids": ids}, pixels, text | pixels)
    for features in ({"input_values": shape((2, 4000))}, {"input_features": shape((2, mels, frames))},
                     {"input_features": shape((2, frames, mels))}, {"input_values": shape((2, 1024, 128))}):
        yield from (features, features | decoder)
