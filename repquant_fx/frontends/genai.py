"""`genai_config.json`: how onnxruntime-genai runs the file of a causal language model."""

from __future__ import annotations

import json
from typing import Any

from repquant_fx.files import MODEL
from repquant_fx.frontends import signature
from repquant_fx.frontends.loading import LoadedModel

NAME = "genai_config.json"
_LONGEST = 2048  # tokens, of a model without a limit
_SEARCH = {"do_sample": False, "num_beams": 1, "past_present_share_buffer": False}  # a file gives its cache anew


def genai_config(loaded: LoadedModel) -> dict[str, bytes]:
    """The file by its name; nothing of a model that keeps no cache, or one that onnxruntime-genai cannot hold: all keys
    and values must have one shape.

    Its model type is `decoder`, for any causal language model: what there is to know is in the names and the shapes.
    """
    if loaded.past is None:
        return {}
    shapes = {shape for layer in loaded.past.shapes for shape in layer}
    vocabulary = signature.vocabulary(loaded.module)
    if len(shapes) != 1 or vocabulary is None:
        return {}
    ((heads, size),) = shapes
    length = signature.positions(loaded.module) or _LONGEST
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask",
             **({"position_ids": "position_ids"} if loaded.past.positions else {})}
    decoder = {
        "filename": MODEL, "session_options": {"provider_options": []},
        "num_hidden_layers": len(loaded.past.shapes), "num_key_value_heads": heads, "head_size": size,
        **_attention(loaded.module, heads, size),
        "inputs": {**names, "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"},
    }
    described = {"model": {"type": "decoder", "vocab_size": vocabulary, "context_length": length,
                           **_special(loaded.module), "decoder": decoder},
                 "search": {**_SEARCH, "max_length": length}}
    return {NAME: (json.dumps(described, indent=2) + "\n").encode()}


def _attention(module: Any, heads: int, size: int) -> dict[str, int]:
    config = signature.text_config(module)
    known = {name: getattr(config, name, None) for name in ("num_attention_heads", "hidden_size")}
    fallback = {"num_attention_heads": heads, "hidden_size": heads * size}
    return {name: value if isinstance(value, int) else fallback[name] for name, value in known.items()}


def _special(module: Any) -> dict[str, Any]:
    """Ids of tokens. Without one that ends a text none does; padding is masked out, so any will do."""
    config = signature.text_config(module)
    begin, end, pad = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    ends = [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    return {**({"bos_token_id": begin} if isinstance(begin, int) else {}),
            **({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}),
            "pad_token_id": pad if isinstance(pad, int) else (ends or [0])[0]}
