"""Text as calibration data: a `.txt` or `.jsonl` file and a tokenizer become input_ids and attention_mask.

A causal language model reads running text, cut into windows of equal length; any other model reads one line at a time,
padded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from repquant_fx import limits
from repquant_fx.calibration.drawn_text import NO_FRAME, Frame
from repquant_fx.errors import CalibrationError, first_line, is_failure
from repquant_fx.files import irregular

TEXT_SUFFIXES = (".txt", ".jsonl")
_BYTES_OF_A_LETTER = 100  # that text takes while it is cut into tokens
LONGEST_LINE = 10_000_000  # characters; a tokenizer reads a line whole, however few of its tokens are used
TEXT_SAMPLES = 128  # sequences, as in the paper
Text: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Tokenization:
    """How text becomes ids.

    Attributes:
        tokenizer: of transformers; None where the model brings none.
        length: tokens of a window, and the most that a line may have.
        causal: running text in windows, instead of lines.
        frame: the special tokens around sequences that are made up.
    """

    tokenizer: Any | None
    length: int
    causal: bool
    frame: Frame = NO_FRAME


def frame_of(tokenizer: Any) -> Frame:
    """The special tokens that a tokenizer of transformers puts around a text.

    Raises:
        CalibrationError: it fails on a letter.
    """
    special = frozenset(int(i) for i in tokenizer.all_special_ids)
    ids = _tokenize(tokenizer, "a", Path("(none)"))
    words = [i for i, token in enumerate(ids) if token not in special]
    if not words:  # a letter is no word of its vocabulary
        return Frame(special=special)
    return Frame(tuple(ids[:words[0]]), tuple(ids[words[-1] + 1:]), special)


def check_text_size(path: Path, what: str) -> None:
    """Refuse a text that does not fit into memory with its tokens, before it is read.

    Raises:
        CalibrationError: it is larger than a share of the memory.
    """
    try:
        size = path.stat().st_size
    except (OSError, ValueError):  # whoever opens it says why
        return
    if size > limits.memory() // _BYTES_OF_A_LETTER:
        raise CalibrationError(
            f"{what} {path} has {limits.readable(size)}, and its tokens would take {_BYTES_OF_A_LETTER} times "
            f"as much: more than the {limits.readable(limits.memory())} of this machine; give a part of it"
        )


def read_text(path: Path) -> list[Text]:
    """The texts of a file: the lines of a `.txt`; of a `.jsonl` the field `text` (and `text_pair`), or a string or a
    pair per line.

    Empty lines are left out.

    Raises:
        CalibrationError: unreadable, not UTF-8, a line without text or longer than LONGEST_LINE, or no text at all;
            with the number of the line.
    """
    if kind := irregular(path):
        raise CalibrationError(f"calibration text {path} is {kind}, not a file")
    check_text_size(path, "calibration text")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration text {path} cannot be read as UTF-8: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if long := next(((number, line) for number, line in numbered if len(line) > LONGEST_LINE), None):
        raise CalibrationError(
            f"calibration text {path}, line {long[0]} has {len(long[1]):,} characters, more than the "
            f"{LONGEST_LINE:,} that a line may have; break it into several"
        )
    texts: list[Text] = []
    if path.suffix.lower() == ".jsonl":
        texts = [_from_json(line, f"{path}, line {number}") for number, line in numbered]
    else:
        texts = [line for _, line in numbered]
    if not texts:
        raise CalibrationError(f"calibration text {path} is empty")
    return texts


def encode(path: Path, how: Tokenization, samples: int, seed: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a text file, both int64 (sequences, length).

    Args:
        path: see `read_text`.
        how: the tokenizer, and windows or lines.
        samples: lines to use at most, chosen by the seed. Windows are all returned, for the caller to choose from.
        seed: of the choice.

    Raises:
        CalibrationError: no tokenizer, no text, a text shorter than one window, pairs for a causal model.
    """
    if how.tokenizer is None:
        raise CalibrationError(
            f"calibration text {path} needs the model's tokenizer, and there is none: give --tokenizer DIR, or "
            "tensors with input_ids and attention_mask (.npz, .pt, .safetensors)"
        )
    if how.length < 1:
        raise CalibrationError(f"a sequence has at least 1 token, not {how.length}")
    if how.causal:
        ids = _windows(path, how)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = read_text(path)
    chosen = random.Random(seed).sample(texts, min(samples, len(texts)))
    return _padded(
        [_tokenize(how.tokenizer, text, path, truncation=True, max_length=how.length) for text in chosen], how.tokenizer
    )


def _windows(path: Path, how: Tokenization) -> Tensor:
    """All whole windows of the running text, side by side: none shares a token with another."""
    if path.suffix.lower() == ".txt":
        read_text(path)  # names what is wrong with it
        whole: Text = path.read_text(encoding="utf-8-sig")
    else:
        texts = read_text(path)
        pair = next((text for text in texts if not isinstance(text, str)), None)
        if pair is not None:
            raise CalibrationError(
                f"calibration text {path} holds pairs, which a causal language model does not read: {str(pair)[:60]}"
            )
        whole = "\n\n".join(text for text in texts if isinstance(text, str))
    ids = _tokenize(how.tokenizer, whole, path)
    count = len(ids) // how.length
    if not count:
        raise CalibrationError(
            f"calibration text {path} has {len(ids)} tokens, less than one sequence of {how.length}; "
            "give more text or a smaller --seq-len"
        )
    return torch.tensor(ids[:count * how.length], dtype=torch.int64).reshape(count, how.length)


def _tokenize(tokenizer: Any, text: Text, path: Path, **options: Any) -> list[int]:
    try:
        first, second = text if isinstance(text, tuple) else (text, None)
        return list(tokenizer(first, second, verbose=False, **options)["input_ids"])
    except BaseException as error:
        if not is_failure(error):
            raise
        raise CalibrationError(f"the tokenizer fails on calibration text {path}, {str(text)[:40]!r}: "
                               f"{type(error).__name__}: {first_line(error)}") from error


def _padded(rows: Sequence[list[int]], tokenizer: Any) -> dict[str, Tensor]:
    """Rows padded to the longest, on the tokenizer's side; what the mask leaves out needs no token of its own."""
    longest = max(1, *(len(row) for row in rows))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), longest), filler, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = longest - len(row) if tokenizer.padding_side == "left" else 0
        ids[index, start:start + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, start:start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _from_json(line: str, where: str) -> Text:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"calibration text {where}: not valid JSON: {error}") from error
    if isinstance(value, dict):
        value = [value[key] for key in ("text", "text_pair") if key in value]
        value = value[0] if len(value) == 1 else value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return value[0], value[1]
    if isinstance(value, str):
        return value
    raise CalibrationError(
        f'calibration text {where}: expected {{"text": "..."}}, a string or a pair of strings; found {line[:60]}'
    )
