"""Text as a model's inputs: the tokenizer, its ids, padding and masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repquant_fx.errors import InputError, first_line, is_failure
from repquant_fx.evaluation.runners import Runner

_KNOWN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_UNLIMITED = 1_000_000  # transformers writes "no limit" as a number larger than any length
LONGEST = 2048  # tokens of a sequence where none are asked for; longer ones cost memory


def tokenizer_for(runner: Runner, directory: str | None) -> Any:
    """The tokenizer of `directory`, or the model's own.

    Raises:
        InputError: there is none.
    """
    from repquant_fx.frontends.huggingface import find_directory
    from repquant_fx.frontends.tokenizer import load_tokenizer

    if directory is not None:
        return load_tokenizer(find_directory(directory))
    if runner.tokenizer is None:
        raise InputError(f"there is no tokenizer beside {runner.source}: give --tokenizer DIR")
    return runner.tokenizer


def ids_name(runner: Runner) -> str:
    """The input that takes token ids: `input_ids`, or the only one of an integer dtype.

    Raises:
        InputError: the model takes no token ids.
    """
    integers = [spec.name for spec in runner.inputs if not spec.dtype.is_floating_point]
    name = "input_ids" if "input_ids" in integers else integers[0] if len(integers) == 1 else None
    if name is None:
        takes = ", ".join(f"{spec.name} {spec.dtype}".replace("torch.", "") for spec in runner.inputs)
        raise InputError(f"a model that reads text has an input input_ids; {runner.source} takes {takes}")
    return name


def fixed_length(runner: Runner) -> int | None:
    """The length that a file fixes for its sequences, in tokens."""
    spec = runner.input(ids_name(runner))
    return spec.shape[1] if spec is not None and len(spec.shape) == 2 else None


def sequence_length(runner: Runner, tokenizer: Any, wanted: int | None) -> int:
    """Tokens of a sequence: `wanted`, or as many as the file, the model and the tokenizer allow, and 2048 at most.

    Raises:
        InputError: more are wanted than the file or the model takes, or less than 2.
    """
    spec, fixed = runner.input(ids_name(runner)), fixed_length(runner)
    longest = spec.longest if spec is not None else None
    if wanted is not None:
        for most, whose in ((fixed, "the file fixes"), (longest, "the model was built for")):
            if most is not None and wanted > most:
                raise InputError(f"--seq-len {wanted}: {whose} sequences of {most} tokens at most")
        if wanted < 2:
            raise InputError(f"--seq-len {wanted}: a sequence has at least 2 tokens")
        return wanted
    stated = tokenizer_limit(tokenizer)
    return min(size for size in (fixed, longest, stated, LONGEST) if size is not None)


def tokenizer_limit(tokenizer: Any) -> int | None:
    """The longest sequence by the description of the tokenizer, or of the model in its directory; None where neither
    states one.
    """
    limits = [getattr(tokenizer, "model_max_length", None)]
    try:
        described = json.loads(Path(str(tokenizer.name_or_path), "config.json").read_text(encoding="utf-8"))
        limits.append(described.get("text_config", described).get("max_position_embeddings"))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass  # a tokenizer alone
    return min((int(size) for size in limits if isinstance(size, int) and 0 < size < _UNLIMITED), default=None)


def tokenize(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Token ids of each text, unpadded.

    Raises:
        InputError: the tokenizer fails.
    """
    try:
        return [list(ids) for ids in tokenizer(list(texts), verbose=False, **options)["input_ids"]]
    except BaseException as error:  # a panic of its library is no Exception
        if not is_failure(error):
            raise
        raise InputError(
            f"the tokenizer fails on {str(texts[0])[:40]!r}: {type(error).__name__}: {first_line(error)}"
        ) from error


def check_vocabulary(runner: Runner, rows: Sequence[Sequence[int]]) -> None:
    """Raises:
        InputError: a token that the model does not know.
    """
    spec = runner.input(ids_name(runner))
    largest = max((max(row) for row in rows if row), default=0)
    if spec is not None and spec.below is not None and largest >= spec.below:
        raise InputError(
            f"the tokenizer gives the token {largest}, but the vocabulary of {runner.source} has {spec.below}: "
            "this is not the model's tokenizer"
        )


def padded(
    rows: Sequence[Sequence[int]], length: int | None = None, filler: int | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, length) int64, filled up on the right to `length` or the longest row."""
    size = length or max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), size), filler or 0, dtype=torch.int64)
    mask = torch.zeros(len(rows), size, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, :len(row)] = 1
    return ids, mask


def text_inputs(runner: Runner, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Those inputs of the model that follow from token ids: ids, mask, segments (all 0) and positions."""
    made = dict(zip(_KNOWN, (ids, mask, torch.zeros_like(ids), (mask.cumsum(1) - 1).clamp(min=0))))
    made[ids_name(runner)] = ids
    return {spec.name: made[spec.name] for spec in runner.inputs if spec.name in made}
