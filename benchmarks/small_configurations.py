"""A configuration of transformers with small numbers: of layers, widths, heads, words and pixels, by what they are
called; and the lists and numbers that have to agree with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shrink import HEADS, INNER, LAYERS, POSITIONS, SIDE, VOCABULARY

_LAYERS = re.compile(r"(^|_)(n_|num_)?(hidden_)?(layers?|blocks|depth)$|^n_layer$|_layers$")
_KEPT = re.compile(r"feat_extract_layers|conv_layers$|downsample")  # counts of lists that are no stack of equal layers
_GIVEN_NONE = re.compile(r"head_dim$|key_value_heads$|vocab_size$|experts_per_tok$|^prediction_length$")


def _numbers(width: int) -> tuple[tuple[str, int], ...]:
    """Names of a number, and the largest that it may be."""
    return (
        (_LAYERS.pattern, LAYERS),
        (r"vocab_size|^vocabulary_size$|_vocab$", VOCABULARY),
        (r"max_(position_embeddings|source_positions|target_positions|seq_len\w*)$|^n_positions$|^n_ctx$", POSITIONS),
        (r"^(prediction|context)_length$|^context_size$|^chunk_size$", 16),
        (r"(heads|n_head|head_count)$", HEADS),
        (r"head_dim$|^d_kv$|_head_size$|rotary_dim$|d_head$", width // HEADS),
        (r"intermediate_size$|ffn_dim$|^d_ff$|mlp_dim$|^n_inner$|ffn_hidden_size$", INNER * width // 32),
        (r"coordinate_size$", width // 8),
        (r"shape_size$", width // 4),
        (r"hidden_size$|^d_model$|^n_embd$|embed_dim$|embedding_size$|projection_(dim|size)$|hidden_dim$|^dim$|_dim$"
         r"|bottleneck_size$|(out|output)_channels$|^d_latents$|^encoder_hidden$|^decoder_hidden$", width),
        (r"image_size$|^img_size$", SIDE),
        (r"(^|_)window_size$", 4),
        (r"^num_(local_)?experts$|^n_routed_experts$|^moe_num_experts$", 4),
        (r"experts_per_tok$|^moe_topk$|^moe_k$", 2),
        (r"^n_group$|^topk_group$|^num_expert_group\w*$", 1),
        (r"groups$", 2),
        (r"num_queries$|^num_latents$", 10),
        (r"^eos_token_id$", 2),
        (r"_token_id$|_token_index$", 3),
    )


_WIDTHS = re.compile(r"embed_dim|hidden_sizes|depths|num_heads|embed_dims|_dims?$|channels$")


def smaller(config: Mapping[str, Any], width: int = 32, filled: bool = False,
            dropped: Sequence[str] = ()) -> dict[str, Any]:
    """The same configuration, and those in it, with small numbers.

    Args:
        width: of the model.
        filled: numbers that a configuration leaves open get a value, too.
        dropped: names that are left out.
    """
    found: dict[str, Any] = {}
    kept = _kept_layers(config)
    for name, value in config.items():
        if name in dropped:
            continue
        found[name] = _smaller(name, value, width, filled, dropped)
        if isinstance(value, (list, tuple)) and len(value) in kept and len(value) > LAYERS:
            found[name] = type(value)(found[name][index] for index in kept[len(value)])
        elif name.startswith("per_layer") and isinstance(value, dict):
            indices = next(iter(kept.values()), ())
            found[name] = {type(key)(indices.index(int(key))): each for key, each in value.items()
                           if int(key) in indices}
    return _agreeing(config, found, filled)


def _smaller(name: str, value: Any, width: int, filled: bool, dropped: Sequence[str]) -> Any:
    if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
        return smaller(value, width, filled, dropped)
    if isinstance(value, (tuple, list)) and _WIDTHS.search(name) and all(type(each) is int for each in value):
        return type(value)(_least(name, each, index, width) for index, each in enumerate(value))
    if type(value) is int and not _KEPT.search(name):
        most = next((most for pattern, most in _numbers(width) if re.search(pattern, name)), None)
        return value if most is None else min(value, most)
    if value is None and filled and _GIVEN_NONE.search(name):
        return next(most for pattern, most in _numbers(width) if re.search(pattern, name))
    return value


def _least(name: str, value: int, index: int, width: int) -> int:
    if "depth" in name:
        return min(value, LAYERS if index == 0 else 1)
    return min(value, HEADS) if "heads" in name else min(value, width)


def _kept_layers(config: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Which layers of a stack are kept, by the number that there were: the first, and the first of another kind."""
    found = {}
    for name, count in config.items():
        if type(count) is int and count > LAYERS and _LAYERS.search(name) and not _KEPT.search(name):
            kinds = config.get("layer_types")
            kinds = kinds if isinstance(kinds, (list, tuple)) and len(kinds) == count else _special(config, count)
            other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 1)
            found[count] = (0, other)
    return found


def _special(config: Mapping[str, Any], count: int) -> list[bool]:
    """Whether each of so many layers has a configuration of its own."""
    own = [each for name, each in config.items() if name.startswith("per_layer") and isinstance(each, dict)]
    return [any(str(index) in map(str, each) for each in own) for index in range(count)]


def _agreeing(old: Mapping[str, Any], new: dict[str, Any], filled: bool) -> dict[str, Any]:
    """Numbers that follow from others: parts of a head that turn, heads of a state space, a head in two parts."""
    heads = new.get("num_attention_heads")
    if isinstance(heads, int) and heads and isinstance(new.get("hidden_size"), int):
        before = old.get("head_dim") or old["hidden_size"] // (old.get("num_attention_heads") or 1)
        after = new.get("head_dim") or new["hidden_size"] // heads
        before, after = (each.get("qk_rope_head_dim") or size for each, size in ((old, before), (new, after)))
        if filled and isinstance(new.get("rope_parameters"), dict):
            half = int(after * (new["rope_parameters"].get("partial_rotary_factor") or 1)) // 2
            shares = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
            new["rope_parameters"] = {"mrope_section": shares, **new["rope_parameters"]}
        _scale_sections(new, after / before if "mrope_section" in (old.get("rope_parameters") or ()) else 1)
    if "qk_head_dim" in new and "qk_rope_head_dim" in new and "qk_nope_head_dim" in new:
        new["qk_head_dim"] = new["qk_rope_head_dim"] + new["qk_nope_head_dim"]
    expand = next((key for key in new if re.search(r"(^|_)expand$", key)), None)
    count = next((key for key in new if re.search(r"mamba\w*heads$", key)), "num_heads")
    size = next((key for key in new if re.search(r"mamba\w*(head_?dim|d_head)$", key)), "head_dim")
    if expand and isinstance(new.get(size), int) and new.get(count):
        new[size] = int(new[expand] * new["hidden_size"]) // new[count]
    return new


def _scale_sections(config: dict[str, Any], factor: float) -> None:
    """The shares of time, height and width in a turned head, so that they still fill it."""
    for name, value in config.items():
        if isinstance(value, dict) and name.startswith("rope"):
            config[name] = value = dict(value)
            _scale_sections(value, factor)
        elif name == "mrope_section" and isinstance(value, (list, tuple)):
            total, parts = round(sum(value) * factor), [int(each * factor) for each in value]
            config[name] = [parts[0] + total - sum(parts), *parts[1:]]
