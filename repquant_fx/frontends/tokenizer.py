"""The tokenizer of a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repquant_fx.errors import InputError, ModelFileError, first_line, is_failure
from repquant_fx.frontends.directory import ModelDirectory, find_files, staged
from repquant_fx.frontends.offline import library, quiet_offline
from repquant_fx.frontends.screening import screen
from repquant_fx.frontends.sentencepiece import SUFFIXES, check_sentencepiece
from repquant_fx.frontends.tokenizer_growth import check_growth
from repquant_fx.security.guard import guarded

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
# What the tokenizers of transformers look for beside these, in a folder that may hold much else.
_VOCABULARIES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*_vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "chat_template.*",
    "*.model",
    "*.spm",
    "*.codes",
    "*.tokenizer",
    "dict.txt",
    "*_maps.json",
    "word_*.json",
    "normalizer.json",
    "emoji.json",
    "tekken.json",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")


def has_tokenizer(folder: Path | ModelDirectory) -> bool:
    """Whether a directory holds a tokenizer's files."""
    path = folder.path if isinstance(folder, ModelDirectory) else folder
    return any((path / name).is_file() for name in _TOKENIZERS)


def load_tokenizer(folder: Path | ModelDirectory) -> Any:
    """The tokenizer of a directory, from its screened files alone.

    Raises:
        InputError: there is none, it cannot be read, names code or other files, or multiplies what it reads.
    """
    transformers = library()
    if not has_tokenizer(folder):
        raise InputError(
            f"there is no tokenizer in {folder.path if isinstance(folder, ModelDirectory) else folder}: looked for "
            f"{', '.join(_TOKENIZERS)}"
        )
    files = find_files(folder)
    try:
        with guarded(f"loading the tokenizer of {files.path}"), staged(_screened(files)) as private, quiet_offline():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                private, local_files_only=True, trust_remote_code=False
            )
            _point_back(tokenizer, private, files)
            return tokenizer
    except BaseException as error:
        if isinstance(error, InputError) or not is_failure(error):
            raise
        raise InputError(f"the tokenizer of {files.path} cannot be read: {first_line(error)}") from error


def _screened(files: ModelDirectory) -> dict[str, bytes]:
    contents = {}
    for name in files.named(*_VOCABULARIES):
        where = str(files.path / name)
        if not name.endswith(".json"):
            contents[name] = files.read(name)
            if name.endswith(SUFFIXES):
                check_sentencepiece(contents[name], where)
            continue
        try:
            value = files.json(name)
        except ModelFileError as error:
            raise InputError(f"the tokenizer of {files.path} cannot be read: {error}") from error
        if name in _SETTINGS:
            value = screen(value, where)
        elif name == "tokenizer.json":
            check_growth(value, where)
        contents[name] = json.dumps(value).encode()
    for name in files.outside & set(_TOKENIZERS):
        files.has(name)  # says that it is a link
    return contents


def _point_back(tokenizer: Any, private: Path, files: ModelDirectory) -> None:
    """The private folder is about to go: what the tokenizer remembers of it leads to the directory itself."""
    tokenizer.name_or_path = str(files.path)
    tokenizer.init_kwargs["name_or_path"] = str(files.path)
    for holder in (vars(tokenizer), tokenizer.init_kwargs):
        for key, value in holder.items():
            if isinstance(value, str) and Path(value).parent == private and Path(value).name in files.files:
                holder[key] = str(files.files[Path(value).name])
