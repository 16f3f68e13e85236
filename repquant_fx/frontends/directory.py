"""The files of a model directory: found once, by name; nothing else is ever opened.

transformers finds files by names of its own and by names that files give. So it never sees the directory itself:
descriptions are read and screened here, and `staged` gives it a private copy of them; weights are opened by us and
handed over as tensors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from repquant_fx import limits
from repquant_fx.errors import ModelFileError, first_line
from repquant_fx.files import irregular

DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # of the model, its tokenizer and its image processor
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # what is fetched from the hub
CONFIG = "config.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_LISTED = (*DESCRIPTIONS, "*.spm", "*.codes", "*.tokenizer", "*.safetensors", "*.bin")
_MOST_BYTES = 128 << 20  # of a description; the largest tokenizers have a quarter
_MOST_FILES = 10_000
_SHOWN = 8


@dataclass(frozen=True)
class ModelDirectory:
    """A directory as it was found.

    Attributes:
        path: as the user wrote it.
        files: where the file of a name really lies; descriptions and weights only.
        outside: names of links that lead out of the directory (and of its cache); they are no part of it.
    """

    path: Path
    files: Mapping[str, Path]
    outside: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether there is a file of that name.

        Raises:
            ModelFileError: there is a link instead that leads elsewhere.
        """
        if name in self.outside:
            raise ModelFileError(
                f"{self.path / name} is a link that leads out of the directory; put the file itself there"
            )
        return name in self.files

    def read(self, name: str, most: int = _MOST_BYTES) -> bytes:
        """The bytes of a description.

        Raises:
            ModelFileError: it is not there, cannot be read, or is larger than `most` bytes.
        """
        if not self.has(name):
            raise ModelFileError(f"there is no {name} in {self.path}")
        try:
            with open_regular(self.files[name]) as file:
                data = bytes(file.read(most + 1))
        except OSError as error:
            raise ModelFileError(f"{self.path / name} cannot be read: {error.strerror or error}") from error
        if len(data) > most:
            raise ModelFileError(f"{self.path / name} is larger than {limits.readable(most)}, which no description is")
        return data

    def json(self, name: str, most: int = _MOST_BYTES) -> Any:
        """The contents of a JSON file.

        Raises:
            ModelFileError: see `read`; or it is not valid JSON.
        """
        data = self.read(name, most)
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{self.path / name} is not valid JSON: {first_line(error)}") from error

    def named(self, *patterns: str) -> list[str]:
        """Sorted names that match one of the patterns."""
        return sorted(name for name in self.files if any(fnmatch(name, pattern) for pattern in patterns))

    def weights(self) -> list[str]:
        """The files that hold the weights: one, or the shards that an index lists. safetensors come before pickles.

        Raises:
            ModelFileError: there are none, or an index names other files than shards of its own kind beside it.
        """
        for whole in _WHOLE:
            if self.has(whole):
                return [whole]
            if self.has(f"{whole}.index.json"):
                return self._shards(f"{whole}.index.json", Path(whole).suffix)
        raise ModelFileError(
            f"{self.path} has no weights: expected model.safetensors, its shards with an index, or pytorch_model.bin"
        )

    def _shards(self, index: str, suffix: str) -> list[str]:
        try:
            shards = sorted(set(self.json(index)["weight_map"].values()))
            wrong = [shard for shard in shards if Path(shard).name != shard]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ModelFileError(f"{self.path / index} is not an index of shards: {first_line(error)}") from error
        if wrong:
            raise ModelFileError(f"{self.path / index} names files outside of its directory: {listed(wrong)}")
        if other := [shard for shard in shards if not fnmatch(shard, f"*{suffix}")]:
            raise ModelFileError(f"{self.path / index} names files that do not end in {suffix}: {listed(other)}")
        if missing := [shard for shard in shards if not self.has(shard)]:
            raise ModelFileError(f"{self.path / index} names files that are missing: {listed(missing)}")
        if not shards:
            raise ModelFileError(f"{self.path / index} is not an index of shards: it names none")
        return shards


def find_files(folder: Path | ModelDirectory) -> ModelDirectory:
    """The files of a directory.

    The snapshots of the hub's cache hold links to blobs beside them; these belong to it.

    Raises:
        ModelFileError: it cannot be listed, has files without number, or a device or a pipe among those that matter.
    """
    if isinstance(folder, ModelDirectory):
        return folder
    files: dict[str, Path] = {}
    outside = set()
    try:
        home = folder.resolve()
        homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if any(fnmatch(entry.name, p) for p in _LISTED))
        for name in names:
            if kind := irregular(folder / name):
                raise ModelFileError(f"not a transformers directory: {folder / name} is {kind}")
            if not (folder / name).is_file():
                continue
            place = (folder / name).resolve()
            if any(place.is_relative_to(each) for each in homes):
                files[name] = place
            else:
                outside.add(name)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelFileError(f"{folder} cannot be listed: {getattr(error, 'strerror', None) or error}") from error
    if len(files) > _MOST_FILES:
        raise ModelFileError(f"{folder} is no model's directory: it has {len(files)} descriptions")
    return ModelDirectory(folder, files, frozenset(outside))


def open_regular(path: Path) -> Any:
    """A resolved path open for reading; not through a link that has taken its place since."""
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")


@contextmanager
def staged(contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A private folder with these files, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="repquant-fx-") as folder:
        for name, data in contents.items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(str(name) for name in names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
