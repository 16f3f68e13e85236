"""Token sequences where there is no text: drawn from a causal language model itself, or at random from a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repquant_fx.progress import progress

LONGEST = 128  # tokens that are drawn: without a key/value cache the work grows with the square
SHORTEST = 64  # where longer ones would be too few
FEWEST, ENOUGH = 8, 32  # sequences
BUDGET = 1e13  # floating-point operations of all steps together

Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """The special tokens that a model expects around a sequence.

    Attributes:
        begin, end: ids before and after it.
        special: ids that do not stand within.
    """

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()


NO_FRAME = Frame()


def affordable(samples: int, length: int, flops: float) -> tuple[int, int]:
    """How many sequences of how many tokens `draw_text` makes within the budget, FEWEST at least.

    Args:
        samples, length: that are wanted.
        flops: that the model takes for a token.

    >>> affordable(128, 512, 1e6), affordable(128, 512, 2.5e8)
    ((128, 128), (19, 64))
    """
    length = min(length, LONGEST)
    while (count := int(BUDGET / (max(flops, 1.0) * length * length / 2))) < min(samples, ENOUGH) and length > SHORTEST:
        length = max(SHORTEST, length // 2)
    return min(samples, max(FEWEST, count)), length


def draw_text(
    scores: Scores, samples: int, length: int, begin: Sequence[int], generator: torch.Generator, vocabulary: int,
    batch_size: int, fixed_length: bool = False,
) -> Tensor:
    """Sequences (samples, length), int64, each token drawn from the model's distribution (temperature 1).

    Args:
        scores: ids (N, T) to logits (N, T, at least `vocabulary`); those at a position depend on no later one.
        begin: ids that every sequence starts with; a random token where there are none.
        vocabulary: ids are below it.
        batch_size: sequences at a time.
        fixed_length: the model takes no other length.

    Raises:
        RuntimeError: the logits are not finite.
    """
    first = [torch.tensor(begin).expand(samples, -1)] if begin else []
    any_token = torch.randint(vocabulary, (samples, 1 - len(first)), generator=generator)
    start = torch.cat([*first, any_token], 1)[:, :length]
    ids = torch.zeros(samples, length, dtype=torch.int64)
    ids[:, :start.shape[1]] = start
    positions = range(start.shape[1], length)
    for position in progress(positions, len(positions), "drawing text"):
        seen = ids if fixed_length else ids[:, :max(2, position)]  # what follows does not count
        for rows in torch.arange(samples).split(batch_size):
            logits = scores(seen[rows])[:, position - 1, :vocabulary].double()
            if not bool(torch.isfinite(logits).any(1).all()) or bool(logits.isnan().any()):
                raise RuntimeError("its logits are not finite")
            ids[rows, position] = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return ids


def random_tokens(samples: int, length: int, frame: Frame, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Sequences (samples, length), int64, of random tokens of the vocabulary within the special ones."""
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in frame.special] or list(range(vocabulary)))
    ids = ordinary[torch.randint(len(ordinary), (samples, length), generator=generator)]
    if length > len(frame.begin) + len(frame.end):
        ids[:, :len(frame.begin)] = torch.tensor(frame.begin, dtype=torch.int64)
        ids[:, length - len(frame.end):] = torch.tensor(frame.end, dtype=torch.int64)
    return ids
