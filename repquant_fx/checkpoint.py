"""Checkpoints: what was decided about each group is kept in a folder; a killed compile resumes where it stopped.

A work directory holds one folder per compile, named by a fingerprint of everything its result depends on; in it one
safetensors file per group, written atomically, and `about.json` for people. Nothing is unpickled. Each file carries a
digest of its tensors, its name and the fingerprint: one that was damaged, changed or taken from another place is made
anew, with a warning. Calibrating is what takes time: a resumed compile replays the decisions through the same passes
and runs the finished part once over the data to reach the next group.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.fx import GraphModule

import repquant_fx
from repquant_fx import exporters, passes
from repquant_fx.distributed import Tensors, World
from repquant_fx.errors import OutputError, RepQuantWarning
from repquant_fx.files import write_part
from repquant_fx.passes.base import attribute
from repquant_fx.recipe import Recipe
from repquant_fx.version import VERSION

_DIGEST = "sha256"  # in the metadata of a file


class Checkpoint:
    """Decisions by name, the same on every rank. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None, world: World | None = None) -> None:
        self.folder, self.world = folder, world or World()

    def load(self, name: str) -> Tensors | None:
        """What was recorded under a name; None where nothing was, or (with a warning) where the file is damaged."""
        return None if self.folder is None else self.world.broadcast(lambda: self._read(name))

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Record under a name; complete or not at all."""
        if self.folder is not None and self.world.rank == 0:
            plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
            write_part(self.folder / f"{name}.safetensors", save(plain, {_DIGEST: self._digest(name, plain)}))

    def _read(self, name: str) -> Tensors | None:
        assert self.folder is not None
        path = self.folder / f"{name}.safetensors"
        try:
            data = path.read_bytes()
            tensors = load(data)
            header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
            if header.get("__metadata__", {}).get(_DIGEST) == self._digest(name, tensors):
                return tensors
            problem = "it is not what was written there"
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            problem = str(error)
        warnings.warn(f"{path} cannot be used and is made anew: {problem}", RepQuantWarning, stacklevel=2)
        return None

    def _digest(self, name: str, tensors: Tensors) -> str:
        """SHA-256 (hex) of what is recorded under a name of this compile."""
        assert self.folder is not None
        digest = hashlib.sha256(f"{self.folder.name}/{name}".encode())
        for key in sorted(tensors):
            digest.update(f"\n{key}".encode())
            _update(digest, tensors[key])
        return digest.hexdigest()


@contextmanager
def open_checkpoint(
    work_dir: str | Path | None, digest: str, about: Mapping[str, Any], world: World
) -> Iterator[Checkpoint]:
    """The checkpoint of one compile in a work directory, locked against other processes while the block runs.

    Raises:
        OutputError: the folder cannot be made, or another process compiles the same model there.
    """
    if work_dir is None or world.rank:
        yield Checkpoint(None if work_dir is None else Path(work_dir), world)  # rank 0 alone reads and writes
        return
    folder = Path(work_dir) / digest[:16]
    lock = FileLock(folder / "lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"another process compiles the same model with the same recipe in {folder}; "
                          "wait for it or give another --work-dir") from error
    except OSError as error:
        raise OutputError(f"cannot work in {str(folder)[:200]}: {error.strerror or error}") from error
    try:
        for leftover in folder.glob(".*"):  # of a file that was being written when a process was killed
            if leftover.is_file():  # a folder is not ours
                leftover.unlink(missing_ok=True)
        write_part(folder / "about.json", (json.dumps({**about, "fingerprint": digest}, indent=2) + "\n").encode())
        yield Checkpoint(folder, world)
    finally:
        lock.release()


def open_cache(work_dir: str | Path | None, digest: str, world: World) -> Checkpoint:
    """What several compiles share, in a folder of the work directory. It is not locked: whoever writes there writes the
    same.

    Raises:
        OutputError: the folder cannot be made.
    """
    if work_dir is None:
        return Checkpoint()
    folder = Path(work_dir) / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot work in {str(folder)[:200]}: {error.strerror or error}") from error
    return Checkpoint(folder, world)


def fingerprint(graph_module: GraphModule, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe, seed: int) -> str:
    """SHA-256 (hex) of the graph, its constants, the calibration data, the recipe, the seed, the code of this package
    and the version of torch."""
    digest = graph_digest(graph_module, recipe.to_dict(), seed)
    for batch in batches:
        digest.update(b"\nbatch")
        for tensor in batch:
            _update(digest, tensor)
    return digest.hexdigest()


def graph_digest(graph_module: GraphModule, *settings: Any) -> hashlib._Hash:
    """SHA-256 of a graph, its constants, plain settings, the code of this package and the version of torch."""
    about = [VERSION, code_digest(), torch.__version__, *settings]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for node in graph_module.graph.nodes:
        digest.update(f"\n{node.format_node()}".encode())
        if node.op == "get_attr":
            _update(digest, attribute(graph_module, node))
    return digest


@functools.cache
def code_digest() -> str:
    """SHA-256 (hex) of the sources of this package: work that other code did is not gone on with, though the version
    may be the same.
    """
    digest = hashlib.sha256()
    seen: dict[Path, str] = {}  # two of the packages may be links inside the first
    for package in (passes, exporters, repquant_fx):
        folder = Path(package.__path__[0])
        for path in folder.rglob("*.py"):
            seen.setdefault(path.resolve(), f"{package.__name__}/{path.relative_to(folder).as_posix()}")
    for path, name in sorted(seen.items(), key=lambda item: item[1]):
        digest.update(f"\n{name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(f"\n{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
