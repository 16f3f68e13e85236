"""Data-parallel calibration: the processes that torchrun started, and what they exchange.

Every rank loads the model and all calibration data, and runs its share of the batches. Observed values are gathered in
the order of the batches, sums over tokens are added up, and rank 0's decision holds wherever one is made, so that all
ranks rewrite their graphs alike. What travels are tensors in the safetensors format, never pickles. One process alone
is a world of size 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from repquant_fx.errors import InputError, LostProcessError, first_line, is_out_of_memory

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """This process among those that calibrate together; all communicate over the default process group (gloo or
    nccl).
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The default process group.

        Raises:
            InputError: there is none.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "distributed calibration needs a process group: start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def shard(self, count: int) -> range:
        """Which of `count` batches this rank runs."""
        return range(self.rank, count, self.size)

    def row_shard(self, count: int) -> slice:
        """Which of `count` rows this rank works on, one run of them; they follow each other in the order of ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_gather(self, tensors: Mapping[str, Tensor]) -> list[Tensors]:
        """What every rank gives, on every rank, in the order of ranks."""
        if self.size == 1:
            return [dict(tensors)]
        sent = _pack(tensors)
        sizes = [torch.zeros(1, dtype=torch.int64, device=sent.device) for _ in range(self.size)]
        with _answering():
            dist.all_gather(sizes, torch.tensor([len(sent)], device=sent.device))
        longest = max(int(s) for s in sizes)
        gathered = [sent.new_empty(longest) for _ in range(self.size)]
        with _answering():
            dist.all_gather(gathered, torch.cat([sent, sent.new_zeros(longest - len(sent))]))
        return [_unpack(part[:int(size)]) for part, size in zip(gathered, sizes)]

    def broadcast(self, make: Callable[[], Mapping[str, Tensor] | None]) -> Tensors | None:
        """What rank 0 makes, on every rank; the others do not call `make`."""
        made = make() if self.rank == 0 else None
        if self.size == 1:
            return None if made is None else dict(made)
        packed = torch.empty(0, dtype=torch.uint8, device=_device()) if made is None else _pack(made)
        length = torch.tensor([len(packed)], device=packed.device)
        with _answering():
            dist.broadcast(length, 0)
        if not int(length):
            return None
        if self.rank:
            packed = packed.new_empty(int(length))
        with _answering():
            dist.broadcast(packed, 0)
        return _unpack(packed)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            moved = tensor.to(_device())
            with _answering():
                dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)

    def check_equal(self, digest: str) -> None:
        """Make sure that all ranks were given the same.

        Raises:
            InputError: they were not.
        """
        digests = self.all_gather({"digest": torch.tensor(list(digest.encode()), dtype=torch.uint8)})
        if any(not torch.equal(f["digest"], digests[0]["digest"]) for f in digests):
            raise InputError(
                "the processes were given different models, calibration data or recipes; data that a callable makes "
                "must be the "
                "same in each, for instance by seeding its random numbers"
            )


def under_torchrun() -> bool:
    """Whether torchrun (or what sets the same variables) started this process beside others."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and os.environ["WORLD_SIZE"] not in ("", "1")


@contextmanager
def _answering() -> Iterator[None]:
    """What a lost connection says of itself, in words: torch raises a RuntimeError, and nothing that tells more.

    Raises:
        LostProcessError: another process does not take part.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LostProcessError(
            "another of the processes that share this compile has ended or does not answer, so this one ends too "
            f"({first_line(error)}); see what the other one said. With --work-dir the same command goes on from the "
            "last finished layer"
        ) from error


@contextmanager
def joined() -> Iterator[World]:
    """A process group over gloo for as long as the block runs where torchrun started this process; else a world of size
    1.
    """
    if not under_torchrun():
        yield World()
        return
    with _answering():
        dist.init_process_group("gloo")
    try:
        yield World.current()
    finally:
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


def _device() -> torch.device:
    """Where the process group takes its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _pack(tensors: Mapping[str, Tensor]) -> Tensor:
    data = bytearray(save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}))
    return torch.frombuffer(data, dtype=torch.uint8).to(_device())


def _unpack(packed: Tensor) -> Tensors:
    return load(packed.cpu().numpy().tobytes())
