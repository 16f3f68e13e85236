"""The files that belong beside a model in its directory: how it is configured and how its inputs are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repquant_fx.files import scratch
from repquant_fx.frontends.directory import DESCRIPTIONS, ModelDirectory
from repquant_fx.frontends.genai import genai_config
from repquant_fx.frontends.huggingface import find_directory
from repquant_fx.frontends.loading import LoadedModel
from repquant_fx.frontends.offline import quiet_offline
from repquant_fx.frontends.tokenizer import has_tokenizer, load_tokenizer

_ELSEWHERE = ("modules.json", "data_config.json")


def companions(loaded: LoadedModel, tokenizer: Any | None = None) -> dict[str, bytes]:
    """Contents by name.

    Of a transformers directory its descriptions as they are (config, generation, tokenizer, processor); of a
    transformers model in memory its configuration; of a timm model a `config.json` as timm writes it (architecture,
    classes, preprocessing). Nothing of other models. Of one that decodes with a cache also `genai_config.json`.

    Args:
        tokenizer: of transformers, or its directory; written where the model's directory has none.
    """
    if loaded.directory is not None:
        files, tokenized = descriptions(loaded.directory), has_tokenizer(loaded.directory)
    else:
        files, tokenized = _configuration(loaded), False
    if tokenizer is None:
        tokenizer = loaded.tokenizer
    if not tokenized and tokenizer is not None:
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(find_directory(str(tokenizer)))
        files |= _saved(tokenizer)
    return files | genai_config(loaded)


def descriptions(files: ModelDirectory) -> dict[str, bytes]:
    """The files of a directory that describe the model, its tokenizer and its processor.

    No weights, no index of weights, and no `modules.json` of a sentence encoder, which names further folders of
    weights. No links that lead
    out of the directory: they would put a file of this machine beside the model.
    """
    return {
        name: files.read(name)
        for name in files.named(*DESCRIPTIONS)
        if not name.endswith(".index.json") and name not in _ELSEWHERE
    }


def _configuration(loaded: LoadedModel) -> dict[str, bytes]:
    config: Any = getattr(loaded.module, "config", None)
    if hasattr(config, "to_json_string"):
        return {"config.json": config.to_json_string().encode()}
    known: Any = getattr(loaded.module, "pretrained_cfg", None)
    if not isinstance(known, dict) or "architecture" not in known:
        return {}
    about = {"architecture": known["architecture"], "num_classes": getattr(loaded.module, "num_classes", None),
             "num_features": getattr(loaded.module, "num_features", None), "pretrained_cfg": loaded.preprocessing}
    return {
        "config.json": (
            json.dumps({key: value for key, value in about.items() if value is not None}, indent=2) + "\n"
        ).encode()
    }


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with scratch() as folder, quiet_offline():
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
