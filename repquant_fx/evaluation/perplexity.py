"""Perplexity of causal language models by the usual strided method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repquant_fx.calibration.text import check_text_size, read_text
from repquant_fx.errors import InputError
from repquant_fx.evaluation.decoder import Decoder, has_cache
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

_PROBE = 8  # tokens that show whether a model sees later ones
_LEAK = 0.05  # of the largest logit; above what quantizing all tokens with one scale can move


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        perplexity: exp of the next.
        nats_per_token: mean negative log-likelihood.
        tokens: scored.
        documents: that the text was cut into.
        seq_len: tokens of a window, its context included.
        stride: tokens from one window to the next.
    """

    perplexity: float
    nats_per_token: float
    tokens: int
    documents: int
    seq_len: int
    stride: int

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.3f}  {self.nats_per_token:.4f} nats per token  ({self.tokens} tokens)"


@dataclass(frozen=True)
class Window:
    """Tokens that are run together; those from `scored` on count, each predicted from all before it in the window."""

    tokens: list[int]
    scored: int


def perplexity(
    runner: Runner, data: Path, *, tokenizer: str | None = None, seq_len: int | None = None, stride: int | None = None,
    separator: str | None = None, batch_size: int = 1, limit: int | None = None,
) -> Perplexity:
    """Perplexity of a text.

    Windows of `seq_len` tokens begin every `stride` tokens, and each scores the tokens that none before it has. What
    the tokenizer puts before a text (a beginning-of-sequence token) stands once before each document and is context
    only; without it the first token is. A file that decodes with a key/value cache takes each window in two halves, so
    that half of all tokens are predicted from what it keeps.

    Args:
        data: UTF-8 text, one document; or a `.jsonl`, one document a line (see `calibration.text.read_text`).
        tokenizer: directory; the model's own where None.
        seq_len: as long as the model takes and 2048 at most where None.
        stride: half of `seq_len` where None. `seq_len` itself gives disjoint windows, whose first tokens are not
            scored.
        separator: text between documents; white space around each is removed.
        batch_size: windows at a time.
        limit: windows at most, from the beginning.

    Raises:
        InputError: model, tokenizer and data do not fit, the model is not causal, or its outputs are not finite.
    """
    reader = tokenizer_for(runner, tokenizer)
    length = sequence_length(runner, reader, seq_len)
    step = stride if stride is not None else max(1, length // 2)
    if not 1 <= step <= length:
        raise InputError(f"--stride {step}: from 1 to {length}, the tokens of a window")
    documents = _documents(data, separator)
    prefix = prefix_of(reader)
    rows = [prefix + ids for ids in tokenize(reader, documents, add_special_tokens=False)]
    check_vocabulary(runner, rows)
    every = [w for row in rows for w in windows(row, length, step, max(1, len(prefix)))]
    if not every:
        raise InputError(f"{data} has no token to score: each needs at least one before it")
    _check_causal(runner, every[0].tokens)
    chosen = every[:limit]
    size = runner.limit(runner.inputs[0].name, batch_size)
    batches = [batch for _, same in groupby(chosen, key=lambda w: len(w.tokens)) for batch in _chunks(list(same), size)]
    nats, tokens = 0.0, 0
    for batch in progress(batches, len(batches), "evaluating"):
        nats += _nats(runner, batch)
        tokens += sum(len(w.tokens) - w.scored for w in batch)
    mean = nats / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, tokens, len(documents), length, step)


def windows(tokens: Sequence[int], length: int, stride: int, first: int = 1) -> Iterator[Window]:
    """The windows of a document. Every token from `first` on is scored once, except one that would begin its window.

    Args:
        tokens: of the document.
        length: tokens of a window; the last may be shorter.
        stride: from one window to the next, in [1, length].
        first: tokens before it are context only; at least 1.
    """
    done = first
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        scored = max(done, begin + 1)
        if scored < end:
            yield Window(list(tokens[begin:end]), scored - begin)
        done = max(done, end)
        if end == len(tokens):
            break


def prefix_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text. (What it puts after one, a causal model is not asked to
    predict.)
    """
    bare, = tokenize(tokenizer, ["a"], add_special_tokens=False)
    whole, = tokenize(tokenizer, ["a"])
    start = next((i for i in range(len(whole)) if bare and whole[i:i + len(bare)] == bare), 0)
    return whole[:start]


def _documents(path: Path, separator: str | None) -> list[str]:
    if path.suffix.lower() == ".jsonl":
        texts = read_text(path)
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path} holds pairs of texts; perplexity needs one text a line")
        whole = [str(text) for text in texts]
    else:
        check_text_size(path, "text")
        try:
            whole = [path.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if separator:
        whole = [part.strip() for text in whole for part in text.split(separator)]
    found = [text for text in whole if text.strip()]
    if not found:
        raise InputError(f"there is no text in {path}")
    return found


def _nats(runner: Runner, batch: Sequence[Window]) -> float:
    """Negative log-likelihood of the scored tokens of windows of one length, summed in float64."""
    logits = token_logits(runner, [w.tokens for w in batch])
    total = 0.0
    for row, window in zip(logits, batch):
        wanted = torch.tensor(window.tokens[window.scored:])
        predicted = row[window.scored - 1:len(window.tokens) - 1].float()
        if not torch.isfinite(predicted).all():
            raise InputError(f"the logits of {runner.source} are NaN or infinite, so it has no perplexity")
        if int(wanted.max()) >= predicted.shape[1]:
            raise InputError(
                f"the tokenizer gives the token {int(wanted.max())}, but {runner.source} has only {predicted.shape[1]} "
                "logits: "
                "this is not the model's tokenizer"
            )
        total += float(torch.nn.functional.cross_entropy(predicted, wanted, reduction="none").double().sum())
    return total


def token_logits(runner: Runner, rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, length, vocabulary) of rows of one length; a file's fixed length is filled up behind them, where a causal
    model cannot see.
    """
    ids, mask = padded(rows, fixed_length(runner))
    if has_cache(runner):  # the second half through it, as text is generated
        decoder = Decoder(runner)
        return torch.cat([decoder(part) for part in ids.tensor_split(2, 1) if part.shape[1]], 1)
    outputs = runner(text_inputs(runner, ids, mask))
    candidates = (
        [outputs["logits"]]
        if "logits" in outputs
        else [o for name, o in outputs.items() if name != "last_hidden_state"]
    )
    found = next((o for o in candidates if o.ndim == 3 and o.shape[1] == ids.shape[1]), None)
    if found is None:
        shapes = ", ".join(f"{name} {list(o.shape)}" for name, o in outputs.items())
        raise InputError(
            "perplexity is of causal language models, with logits (batch, tokens, vocabulary) for tokens "
            f"{list(ids.shape)}; "
            f"{runner.source} gives {shapes}"
        )
    return first_rows(found, len(rows))


def _check_causal(runner: Runner, tokens: Sequence[int]) -> None:
    """A model that reads the token it is asked for has no perplexity: another last token must leave the logits before
    it as they are.
    """
    probe = list(tokens[:_PROBE])
    other = [*probe[:-1], next(token for token in (*tokens, 0, 1) if token != probe[-1])]
    one, two = (token_logits(runner, [row])[0, :len(probe) - 1].double() for row in (probe, other))
    if float((one - two).abs().max()) > _LEAK * float(one.abs().max()):
        raise InputError(
            f"{runner.source} is no causal language model: its logits at a token depend on the tokens after it, so it "
            "has no "
            "perplexity"
        )


def _chunks(items: list[Window], size: int) -> Iterator[list[Window]]:
    for start in range(0, len(items), size):
        yield items[start:start + size]
