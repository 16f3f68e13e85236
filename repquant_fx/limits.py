"""What a file or an option asks for, judged before memory is taken: sizes of tensors, of modules, of archives."""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from repquant_fx.errors import InputError
from repquant_fx.torch_private import TorchDispatchMode, pytree, size_hint, watched_registration

_MOST_MODULES = 30_000  # the largest public transformers have a few thousand
_SPARE = 1 << 24  # elements that a model may have beyond its files: new heads, tables, tied weights under two names
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 20
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory() -> int:
    """Bytes that this process may use: memory with swap, or the limit of its control group or of its resources where
    that is lower.
    """
    limits = [_physical_memory()]
    try:
        import resource
    except ImportError:  # Windows
        return limits[0]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(limits + ([soft] if soft != resource.RLIM_INFINITY else []))


@cache
def _physical_memory() -> int:
    limits = [1 << 50]
    for path in _CGROUP:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no control group, or "max"
            continue
    try:
        meminfo = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        limits.append(1024 * (int(meminfo["MemTotal"]) + int(meminfo.get("SwapTotal", 0))))
    except (OSError, KeyError):
        with suppress(AttributeError, OSError, ValueError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits)


def check_size(shape: Iterable[int], what: str, itemsize: int = 4) -> None:
    """Refuse a tensor that this machine cannot hold.

    Args:
        shape: of the tensor.
        what: for the message.
        itemsize: bytes per element.

    Raises:
        InputError: it is larger than the memory, or a size is negative.
    """
    shape = tuple(shape)
    if any(side < 0 for side in shape):
        raise InputError(f"{what} has the shape {_short(shape)}")
    size = math.prod(shape) * itemsize
    if size > memory():
        raise InputError(
            f"{what} of shape {_short(shape)} takes {readable(size)}, and this machine has {readable(memory())}"
        )


def check_results(graph: Graph, what: str) -> None:
    """Refuse a graph with a result that this machine cannot hold, before it runs.

    Args:
        graph: exported; its nodes know their results on the example inputs.
        what: for the message.

    Raises:
        InputError: see `check_size`.
    """
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = [size_hint(size) for size in value.shape] if isinstance(value, Tensor) else []
            known = [size for size in sizes if size is not None]
            if sizes and len(known) == len(sizes):
                check_size(known, f"{what}: a result of {node.target}", value.element_size())


@contextmanager
def bounded_modules(what: str) -> Iterator[None]:
    """While modules are built, refuse parameters and buffers beyond the memory, and more layers than any model has.

    They are counted as they are registered. On the meta device that is before memory is taken.

    Raises:
        InputError: too large.
    """
    sizes: dict[tuple[int, str], int] = {}
    total = modules = 0
    most = memory()

    def tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal total
        if value is None:
            return
        key = id(module), name  # weights that are read later take the place of the first ones
        size = value.numel() * value.element_size()
        total += size - sizes.get(key, 0)
        sizes[key] = size
        if total > most:
            raise InputError(
                f"{what} is too large: its weights take more than the {readable(most)} that this machine has"
            )

    def child(module: nn.Module, name: str, value: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > _MOST_MODULES:
            raise InputError(f"{what} is too large: more than {_MOST_MODULES} layers")

    with watched_registration(tensor, child):
        yield


class _Sizes(TorchDispatchMode):
    """Every tensor that is made must be one that this machine can hold."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.most = memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() > self.most:
                raise InputError(
                    f"{self.what} is too large: a table of {readable(tensor.numel() * tensor.element_size())} on the "
                    "way, and this "
                    f"machine has {readable(self.most)}"
                )
        return made


@contextmanager
def rehearsal(what: str) -> Iterator[None]:
    """What is built in the block is built on the meta device, and refused where its modules (`bounded_modules`) or any
    tensor on the way are too large.

    Raises:
        InputError: too large.
    """
    with torch.device("meta"), bounded_modules(what), _Sizes(what):
        yield


def check_amount(skeleton: nn.Module | None, tensors: Mapping[Any, Any], what: str) -> None:
    """Refuse a description that asks for far more memory than there are weights, before the memory is taken.

    Args:
        skeleton: the model on the meta device, if it can be built so.
        tensors: those of the files, or slices of them.
        what: for the message.

    Raises:
        InputError: the model has more than twice the elements of the files.
    """
    if skeleton is None:
        return
    wanted = sum({id(tensor): tensor.numel() for tensor in [*skeleton.parameters(), *skeleton.buffers()]}.values())
    given = sum(math.prod(_shape_of(tensor)) for tensor in tensors.values())
    if wanted > 2 * given + _SPARE:
        raise InputError(
            f"{what} of {wanted:,} weights, but its files hold {given:,}: they belong to another model, or weights "
            "are missing"
        )


def _shape_of(tensor: Any) -> Sequence[int]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor.get_shape())


def unpacks_to(data: bytes | Path) -> int | None:
    """Bytes that a zip archive declares, where these are over 1 GiB and over 20 times its own size; None for any other
    data.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data) if isinstance(data, bytes) else data) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
    except Exception:  # whoever reads it says what is wrong with it
        return None
    return declared if declared > _BOMB_BYTES and declared > _BOMB_RATIO * size else None


def readable(size: int) -> str:
    """Bytes in words.

    >>> readable(3 * 10**12)
    '3.0 TB'
    """
    unit, amount = "B", float(min(size, 10**27))
    for unit in ("B", "KB", "MB", "GB", "TB", "PB", "EB"):
        if amount < 1000 or unit == "EB":
            break
        amount /= 1000
    return f"{amount:.1f} {unit}"


def _short(shape: tuple[int, ...]) -> str:
    text = str(list(shape))
    return text if len(text) <= 80 else f"{text[:80]}..."
