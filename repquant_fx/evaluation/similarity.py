"""Semantic textual similarity: do cosines of sentence embeddings rank pairs as people do?"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repquant_fx.calibration.text import check_text_size
from repquant_fx.errors import InputError
from repquant_fx.evaluation.classification import subset
from repquant_fx.evaluation.runners import Runner, first_rows
from repquant_fx.evaluation.text import (
    check_vocabulary,
    fixed_length,
    padded,
    sequence_length,
    text_inputs,
    tokenize,
    tokenizer_for,
)
from repquant_fx.progress import progress

PAIR_SUFFIXES = (".csv", ".tsv", ".jsonl")
_COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class Similarity:
    """Result of an evaluation.

    Attributes:
        spearman: rank correlation of the cosines with the gold scores, -1 to 1.
        pearson: linear correlation, likewise.
        pairs: evaluated.
    """

    spearman: float
    pearson: float
    pairs: int

    def __str__(self) -> str:
        return f"Spearman {self.spearman:.4f}  Pearson {self.pearson:.4f}  ({self.pairs} pairs)"


@dataclass(frozen=True)
class Pair:
    """Two sentences and how similar people find them."""

    first: str
    second: str
    score: float


def similarity(
    runner: Runner, data: Path, *, tokenizer: str | None = None, seq_len: int | None = None, batch_size: int = 64,
    limit: int | None = None, seed: int = 0,
) -> Similarity:
    """Correlation of a sentence encoder's cosines with gold scores.

    An embedding is the mean of the model's token outputs where the attention mask is 1, or else the vector that it
    gives a sentence.

    Args:
        data: see `read_pairs`.
        tokenizer: directory; the model's own where None.
        seq_len: longer sentences are cut; as long as the model takes and 2048 at most where None.
        batch_size: sentences at a time.
        limit: a random subset of this many pairs.
        seed: of the subset.

    Raises:
        InputError: model, tokenizer and data do not fit, fewer than two pairs, or a correlation that is not defined.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise InputError("similarity needs scipy: pip install 'repquant-fx[language]'") from error
    every = read_pairs(data)
    pairs = [every[i] for i in subset(len(every), limit, seed)]
    if len(pairs) < 2:
        raise InputError(f"a correlation needs at least 2 pairs; {data} gives {len(pairs)}")
    reader = tokenizer_for(runner, tokenizer)
    length = sequence_length(runner, reader, seq_len)
    sentences = list(dict.fromkeys(sentence for pair in pairs for sentence in (pair.first, pair.second)))
    rows = tokenize(reader, sentences, truncation=True, max_length=length)
    check_vocabulary(runner, rows)
    vectors = dict(zip(sentences, embed(runner, rows, batch_size, reader.pad_token_id)))
    cosines = [float(torch.nn.functional.cosine_similarity(vectors[p.first], vectors[p.second], dim=0)) for p in pairs]
    gold = [pair.score for pair in pairs]
    if len(set(gold)) < 2 or len(set(cosines)) < 2 or not all(map(math.isfinite, cosines)):
        raise InputError(
            f"the {'scores of ' + str(data) if len(set(gold)) < 2 else 'embeddings of ' + runner.source} are all equal "
            "or not "
            "finite, so there is no correlation"
        )
    largest = max(map(abs, gold))
    linear = stats.pearsonr(cosines, [score / largest for score in gold])  # a scale changes nothing; squares overflow
    found = Similarity(float(stats.spearmanr(cosines, gold).statistic), float(linear.statistic), len(pairs))
    if not math.isfinite(found.pearson) or not math.isfinite(found.spearman):
        raise InputError(f"the scores of {data} differ too little to correlate")
    return found


def embed(runner: Runner, rows: Sequence[Sequence[int]], batch_size: int, filler: int | None = None) -> Tensor:
    """Embeddings (rows, width) float64 of tokenized sentences.

    Raises:
        InputError: the model gives no embeddings, or takes no attention mask and so cannot be given sentences shorter
            than it fixes.
    """
    fixed, masked = fixed_length(runner), runner.input("attention_mask") is not None
    short = [len(row) for row in rows if len(row) != fixed]
    if fixed and short and not masked:
        raise InputError(
            f"{runner.source} fixes sequences of {fixed} tokens and takes no attention_mask, so sentences of "
            f"{short[0]} tokens "
            "cannot be filled up; export it with a free sequence length"
        )
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    size, batches = runner.limit(runner.inputs[0].name, batch_size), list[list[int]]()
    for i in order:
        # without a mask nothing may be padded
        same = masked or not batches or len(rows[batches[-1][0]]) == len(rows[i])
        if batches and same and len(batches[-1]) < size:
            batches[-1].append(i)
        else:
            batches.append([i])
    found: dict[int, Tensor] = {}
    for batch in progress(batches, len(batches), "evaluating"):
        ids, mask = padded([rows[i] for i in batch], fixed, filler)
        outputs = {name: first_rows(o, len(batch)) for name, o in runner(text_inputs(runner, ids, mask)).items()}
        found.update(zip(batch, _pooled(outputs, mask, runner.source)))
    return torch.stack([found[i] for i in range(len(rows))])


def _pooled(outputs: dict[str, Tensor], mask: Tensor, source: str) -> Tensor:
    """The vector of each sentence: one that the model gives by that name, the mean of its tokens, or any that it
    gives.
    """
    embeddings = {
        name: o for name, o in outputs.items() if name != "logits" and len(o) == len(mask) and o.is_floating_point()
    }
    if "sentence_embedding" in embeddings:
        return embeddings["sentence_embedding"].double()
    tokens = embeddings.get(
        "last_hidden_state", next((o for o in embeddings.values() if o.ndim == 3 and o.shape[1] == mask.shape[1]), None)
    )
    if tokens is not None:
        weights = mask[..., None].double()
        return (tokens.double() * weights).sum(1) / weights.sum(1)
    pooled = next((o for o in embeddings.values() if o.ndim == 2), None)
    if pooled is None:
        shapes = ", ".join(f"{name} {list(o.shape)}" for name, o in outputs.items())
        raise InputError(f"similarity needs embeddings of tokens or sentences; {source} gives {shapes}")
    return pooled.double()


def read_pairs(path: Path) -> list[Pair]:
    """Sentence pairs with scores.

    A `.csv` or `.tsv` has the columns sentence1, sentence2 and score, or no header and these as its first three; a
    `.jsonl` has objects with these keys or lists of three.

    Raises:
        InputError: unreadable or malformed; with the number of the line.
    """
    check_text_size(path, "sentence pairs")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return [_pair(_json_row(line, path, n), path, n) for n, line in enumerate(file, 1) if line.strip()]
            # quotes in a .tsv are part of the text
            rows = (
                csv.reader(file, "excel")
                if path.suffix.lower() == ".csv"
                else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            )
            table = [(rows.line_num, row) for row in rows if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"sentence pairs {path} cannot be read: {error}") from error
    if not table:
        raise InputError(f"there are no sentence pairs in {path}")
    columns = [0, 1, 2]
    header = [name.strip().lower() for name in table[0][1]]
    if set(_COLUMNS) <= set(header):
        columns, table = [header.index(name) for name in _COLUMNS], table[1:]
    elif not _is_number(header[2] if len(header) > 2 else ""):
        raise InputError(
            f"sentence pairs {path}: expected the columns sentence1, sentence2 and score, or rows of these three; the "
            "first row is "
            f"{', '.join(table[0][1])[:80]}"
        )
    return [_pair([row[c] for c in columns if c < len(row)], path, n) for n, row in table]


def _json_row(line: str, path: Path, number: int) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"sentence pairs {path}, line {number}: not valid JSON: {error}") from error
    return [value.get(name) for name in _COLUMNS] if isinstance(value, dict) else value


def _pair(row: Any, path: Path, number: int) -> Pair:
    if (
        isinstance(row, list)
        and len(row) >= 3
        and isinstance(row[0], str)
        and isinstance(row[1], str)
        and _is_number(row[2])
    ):
        return Pair(row[0], row[1], float(row[2]))
    raise InputError(
        f"sentence pairs {path}, line {number}: expected sentence1, sentence2 and a number; found {str(row)[:80]}"
    )


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):  # the last: an integer of more digits than a float has
        return False
