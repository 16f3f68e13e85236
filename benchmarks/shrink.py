"""Architectures at a small size: the constructor's numbers of layers, widths, heads and pixels made small, by what they
are called. What cannot be built and run so is tried with fewer of them changed.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS, SIDE, PATCH, TOKENS = 32, 2, 2, 48, 96, 64, 64, 8, 12
LARGEST = 40_000_000  # parameters of a model that counts as small


class NotSmall(Exception):
    """No small model of an architecture could be built and run; says why the last try failed."""


def redrawn(model: nn.Module) -> nn.Module:
    """Weights drawn anew: as they are initialised, many outputs are nearly zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                matrix = name.endswith("weight") and parameter.ndim >= 2
                parameter.copy_(noise / math.sqrt(parameter[0].numel()) if matrix
                                else torch.exp(0.3 * noise) if name.endswith("weight") else 0.3 * noise)
    return model.eval()


# ---- timm ------------------------------------------------------------------------------------------------------------


def transformers_of_timm() -> dict[str, str]:
    """Names of timm whose file has a class of attention, and the file."""
    import timm

    found = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if re.search(r"^class \w*(Attention|Attn)\w*", inspect.getsource(sys.modules[module]), re.MULTILINE):
            found[name] = module.rpartition(".")[2]
    return found


def small_timm(name: str) -> nn.Module:
    """The model, weights drawn anew.

    Raises:
        NotSmall: see there.
    """
    import timm

    module: Any = sys.modules[timm.model_entrypoint(name).__module__]
    build, why = module.build_model_with_cfg, "it does not build by timm's builder"
    for widths, side in ((True, SIDE), (True, None), (False, SIDE), (False, None)):
        def smaller(cls: Any, variant: str, pretrained: bool, *rest: Any, w: bool = widths, s: int | None = side,
                    **given: Any) -> Any:
            return build(cls, variant, False, *rest, **{**given, **_timm_arguments(cls, given, w, s)})

        module.build_model_with_cfg = smaller
        try:
            model = redrawn(timm.create_model(name, pretrained=False))
            _check(model, _timm_images(model))
            return model
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            module.build_model_with_cfg = build
    raise NotSmall(why)


def _timm_arguments(cls: Any, given: Mapping[str, Any], widths: bool, side: int | None) -> dict[str, Any]:
    """Smaller values of what a class takes, those that it is given and those that it has by default."""
    parameters = inspect.signature(cls).parameters
    values = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    found: dict[str, Any] = {}
    for name, value in {**values, **given}.items():
        plain = isinstance(value, int) and not isinstance(value, bool)
        if name in ("depth", "num_layers") and plain:
            found[name] = min(value, LAYERS)
        elif name in ("depths", "layers") and isinstance(value, (tuple, list)):
            found[name] = type(value)(min(each, LAYERS if i == 0 else 1) for i, each in enumerate(value))
        elif widths and name == "num_heads":
            found[name] = min(value, HEADS) if plain else type(value)(min(each, HEADS) for each in value)
        elif widths and name in ("embed_dim", "dim", "width") and plain:
            found[name] = min(value, WIDTH)
        elif widths and name in ("embed_dim", "embed_dims", "dims", "dim") and isinstance(value, (tuple, list)):
            found[name] = type(value)(max(16, round(each / value[0] * 2) * 8) for each in value)
        elif name == "img_size" and side is not None:
            found[name] = side
    if side is not None and "img_size" in parameters:
        found["img_size"] = side
    return {**found, "num_classes": 5} if "num_classes" in parameters else found


def _timm_images(model: nn.Module) -> dict[str, Tensor]:
    from repquant_fx.frontends.architectures import example_inputs

    return {"x": example_inputs(model)[0]}


# ---- transformers ----------------------------------------------------------------------------------------------------

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


def architectures_of_transformers() -> list[str]:
    """Types of models that have a general class."""
    import transformers

    mapping = transformers.AutoModel._model_mapping
    return [kind for kind in mapping._model_mapping if kind in mapping._config_mapping]


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
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                raise NotSmall(f"{size / 1e6:.0f} M parameters in a small configuration")
            torch.manual_seed(0)
            model = redrawn(cls(config))
            return model, _first_that_runs(model, config)
        except NotSmall:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
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
                _check(model, inputs, by_name=True)
                return inputs
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
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


def _check(model: nn.Module, inputs: Mapping[str, Tensor], by_name: bool = False) -> None:
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError("it is not small")
    with torch.inference_mode():
        model(**inputs) if by_name else model(*inputs.values())
