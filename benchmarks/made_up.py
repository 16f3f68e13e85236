"""Inputs of models of transformers, made up by the names of what they take: text, images, films, sound, series."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from shrink import POSITIONS, SIDE, TOKENS, VOCABULARY
from torch import Tensor

_TEXT = ("input_ids", "attention_mask")
_SERIES = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
_TOGETHER = (
    (*_TEXT, "decoder_input_ids"), _TEXT, ("input_ids",), ("pixel_values",), (*_TEXT, "pixel_values"),
    (*_TEXT, "bbox"), (*_TEXT, "bbox", "pixel_values"), (*_TEXT, "bbox", "pixel_values", "decoder_input_ids"),
    ("input_values",), ("input_values", "decoder_input_ids"), (*_TEXT, "input_values"),
    ("input_features",), ("input_features", "decoder_input_ids"), (*_TEXT, "input_features"),
    ("input_features", "attention_mask"), ("input_features", "input_features_mask"), ("input_values", "input_features"),
    ("pixel_values_videos",), (*_TEXT, "pixel_values_videos"), _SERIES, ("past_values",),
    (*_TEXT, "visual_feats", "visual_pos"),
    ("query_embeds", "encoder_hidden_states"), ("pixel_values", "task_inputs"), ("inputs",), ("inputs_embeds",),
    ("hidden_states",), ("audio_codes",), ("codes",), ("states", "actions", "rewards", "returns_to_go", "timesteps"),
)


def inputs_of(config: Any, takes: Mapping[str, inspect.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Inputs, two of each, by name: all that `forward` needs, in the shapes that there are for it.

    Args:
        takes: the parameters of `forward`.
    """
    needed = {name for name, each in takes.items()
              if each.default is inspect.Parameter.empty and each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    for names in _TOGETHER:
        if needed <= set(names) <= set(takes):
            shapes = [list(_made(name, config)) for name in names]
            for index in range(max(map(len, shapes))):
                yield {name: each[min(index, len(each) - 1)] for name, each in zip(names, shapes)}


def _made(name: str, config: Any) -> Iterator[Tensor]:
    """What one input may be, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    text = getattr(config, "text_config", None) or config
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 32
    if name in ("input_ids", "decoder_input_ids", "inputs", "task_inputs", "timesteps"):
        known = TOKENS if name == "timesteps" else getattr(text, "vocab_size", None)
        words = min(VOCABULARY, known) if type(known) is int and known > 5 else VOCABULARY
        ids = torch.randint(min(4, words - 2), words - 1, (2, TOKENS), generator=generator)
        end = getattr(text, "eos_token_id", None)  # some read a sentence where it ends
        ids[:, -1] = end if isinstance(end, int) and 0 <= end < words else ids[:, -1]
        yield ids
    elif name in ("attention_mask", "input_features_mask"):
        yield from (torch.ones(2, length, dtype=torch.long) for length in (TOKENS, 2 * POSITIONS))
    elif name == "bbox":
        corners = torch.randint(0, 40, (2, TOKENS, 2), generator=generator)
        yield torch.cat([corners, corners + 10], -1)
    elif name in ("audio_codes", "codes"):
        yield from (torch.randint(0, 4, size, generator=generator) for size in ((2, 4, TOKENS), (2, TOKENS)))
    else:
        for size in _sizes(name, config, width):
            yield torch.randn(2, *size, generator=generator)


def _sizes(name: str, config: Any, width: int) -> Iterator[tuple[int, ...]]:
    """Sizes of one item of an input of decimal numbers."""
    from repquant_fx.frontends.architectures import config_image_shape

    channels, height, side = config_image_shape(SimpleNamespace(config=config)) or (3, SIDE, SIDE)  # type: ignore[arg-type]
    audio = next((getattr(config, key) for key in ("audio_config", "encoder_config") if hasattr(config, key)), config)
    mels = next((getattr(each, key) for each in (config, audio) for key in ("num_mel_bins", "feature_size", "input_dim")
                 if isinstance(getattr(each, key, None), int)), 80)
    frames = 2 * getattr(audio, "max_source_positions", POSITIONS)
    steps = getattr(config, "context_length", None) or 16
    steps += max(getattr(config, "lags_sequence", None) or [0]) if name.startswith("past") else 0
    variables = getattr(config, "num_input_channels", None)
    if name in ("pixel_values", "pixel_values_videos"):
        count = next((getattr(config, key) for key in ("num_frames", "frames_per_clip")
                      if isinstance(getattr(config, key, None), int)), 4)
        images = [(channels, height, side), (1, height, side)] if name == "pixel_values" else []
        yield from (*images, (count, channels, height, side), (channels, count, height, side))
    elif name == "input_values":
        yield from ((4000,), (1, 4000), (1024, 128), (1, 1024, 64))
    elif name == "input_features":
        yield from ((mels, frames), (frames, mels), (1, mels, frames), (1, 1001, 64))
    elif name in ("past_values", "past_observed_mask"):
        yield (steps, variables) if variables else (steps,)
    elif name in ("past_time_features", "future_time_features", "future_values"):
        ahead = getattr(config, "prediction_length", None) or 1
        length = steps if name.startswith("past") else ahead
        yield (length, getattr(config, "num_time_features", 0)) if "time" in name else (length,)
    elif name in ("visual_feats", "visual_pos"):
        yield (TOKENS, getattr(config, "visual_feat_dim", width) if name == "visual_feats" else 4)
    elif name in ("states", "actions", "rewards", "returns_to_go"):
        yield (TOKENS, getattr(config, {"states": "state_dim", "actions": "act_dim"}.get(name, ""), 1))
    else:
        yield (TOKENS, getattr(config, "encoder_hidden_size", width) if "encoder" in name else width)
