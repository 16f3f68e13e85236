"""Accuracy of quantized language models under ONNX Runtime, beside float and peers: the language tables of
docs/benchmarks.md.

    python benchmarks/language_accuracy.py --stories FOLDER --stories-text tinystories_sample.txt \\
        --minilm FOLDER --sts stsb-en-dev.csv --text wiki.test.raw --results benchmarks/results/language.json

- stories260K, as a transformers directory that `stories260k.py` makes: nats per token over the stories of a text file,
  each from its start. Calibrated on 128 stories that the float model itself draws, since it knows no other text.
- MiniLM-L6, a sentence encoder (post-LN BERT) as a transformers directory: Spearman correlation of cosine similarities
  with people's judgements on sentence pairs. Calibrated on 128 lines of `--text`.

Rows: float; RTN with min-max per tensor, what common tools do; SmoothQuant; RepQ-ViT's parts; RepQuant as published;
RepQuant as it is by default here; at four bits also without one of its parts, and with all kinds of cross-layer
equalization. Several `--seeds` draw other calibration text each, and give mean and standard deviation. Rows that
`--results` already holds for the same commit are not run again (`results.py`).
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import PARTS, published
from results import Key, Results, Values, add_options, cell
from torch import Tensor

from repquant_fx import Recipe, compile, repq_vit, rtn, smoothquant
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.recipe import EQUALIZE

BITS = [(8, 8), (6, 6), (4, 8), (4, 4)]
ABLATED = [(4, 4)]
Predict = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask -> first output


def rows() -> Iterator[tuple[str, Recipe]]:
    """(label, recipe)."""
    for w, a in BITS:
        ours = Recipe(wbits=w, abits=a)
        yield f"RTN, min-max W{w}A{a}", rtn(w, a)
        yield f"SmoothQuant W{w}A{a}", smoothquant(w, a)
        yield f"RepQ W{w}A{a}", repq_vit(w, a)
        yield f"RepQuant as published W{w}A{a}", published(w, a)
        if (w, a) in ABLATED:
            yield f"RepQuant, no equalization W{w}A{a}", replace(ours, equalize=())
            yield f"RepQuant, equalizing all W{w}A{a}", replace(ours, equalize=EQUALIZE)
            for name, change in PARTS.items():
                yield f"RepQuant, no {name} W{w}A{a}", replace(ours, **change)
        yield f"RepQuant W{w}A{a}", ours


class Stories:
    """Nats a token of a causal language model on documents separated by `<|endoftext|>`."""

    metric, better = "nats per token", min

    def __init__(self, loaded: LoadedModel, text: Path, samples: int, seed: int) -> None:
        self.loaded, tokenizer = loaded, loaded.tokenizer
        documents = [d.strip() for d in text.read_text(encoding="utf-8").split("<|endoftext|>") if d.strip()]
        self.documents: list[Tensor] = [tokenizer(d, return_tensors="pt").input_ids for d in documents]
        torch.manual_seed(seed)
        start = torch.full((samples, 1), tokenizer.bos_token_id)
        assert loaded.module is not None
        with torch.no_grad():
            ids = start
            for _ in range(255):
                logits = loaded.module(input_ids=ids).logits[:, -1]
                ids = torch.cat([ids, torch.multinomial(torch.softmax(logits, -1), 1)], 1)
        self.calibration: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def measure(self, predict: Predict) -> float:
        nats = tokens = 0.0
        for ids in self.documents:
            logits = predict(ids[:, :-1], torch.ones_like(ids[:, :-1]))
            nats += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
        return nats / tokens


class Similarity:
    """Spearman correlation, times 100, of the cosine of mean-pooled embeddings with gold scores."""

    metric, better = "Spearman x 100", max

    def __init__(self, loaded: LoadedModel, pairs: Path, text: Path, samples: int, seed: int) -> None:
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        with pairs.open(encoding="utf-8", newline="") as file:
            table = [row for row in csv.reader(file) if len(row) >= 3]
        self.sentences = [row[0] for row in table] + [row[1] for row in table]
        self.gold = np.array([float(row[2]) for row in table])
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if len(line.split()) > 8]
        chosen = np.random.default_rng(seed).choice(len(lines), samples, replace=False)
        batch = self.tokenizer(
            [lines[i] for i in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        self.calibration: Any = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def measure(self, predict: Predict) -> float:
        from scipy.stats import spearmanr

        order = sorted(range(len(self.sentences)), key=lambda i: len(self.sentences[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), 64):
            part = order[start:start + 64]
            batch = self.tokenizer([self.sentences[i] for i in part], padding=True, return_tensors="pt")
            hidden = predict(batch.input_ids, batch.attention_mask)
            mask = batch.attention_mask[..., None].float()
            mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
            found.update(zip(part, mean))
        count = len(self.gold)
        cosines = [float(found[i] @ found[count + i]) for i in range(count)]
        return 100 * float(spearmanr(cosines, self.gold).statistic)


METRICS = {"stories260K": Stories.metric, "MiniLM-L6": Similarity.metric}


def run_all(name: str, bench: Any, results: Results, seed: int, only: str | None) -> None:
    def row(label: str, run: Callable[[], dict[str, float]]) -> None:
        if only and not re.search(only, label):
            return
        found, new = results.measure((name, label), seed, run)
        if new:
            print(f"{name:12s} seed {seed} {label:44s} " + " ".join(f"{k} {v:.3f}" for k, v in found.items()),
                  flush=True)

    def as_float() -> dict[str, float]:
        def predict(ids: Tensor, mask: Tensor) -> Tensor:
            with torch.no_grad():
                return next(iter(bench.loaded.module(input_ids=ids, attention_mask=mask).values()))

        return {"score": bench.measure(predict)}

    def compiled(recipe: Recipe) -> dict[str, float]:
        start = time.perf_counter()
        result = compile(
            bench.loaded,
            recipe=recipe,
            calibration=bench.calibration,
            samples=len(bench.calibration["input_ids"]),
            batch_size=16,
            with_past=False,
        )
        seconds, session = time.perf_counter() - start, result.session(torch.get_num_threads())

        def predict(ids: Tensor, mask: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

        worst = min((e["sqnr_db"], e["path"]) for e in result.report["layers"] if e["sqnr_db"] is not None)
        print(f"{'':12s} worst layer {worst[1]} {worst[0]:.1f} dB")
        return {"score": bench.measure(predict), "sqnr_db": result.report["output_sqnr_db"] or math.inf,
                "megabytes": result.report["file_bytes"] / 1e6, "compile_seconds": seconds}

    row("float", as_float)
    for label, recipe in rows():
        row(label, lambda r=recipe: compiled(r))  # type: ignore[misc]


def tables(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: one row per method, one pair of columns per model; mean and spread over the seeds."""
    names = list(dict.fromkeys(name for name, _ in rows))
    lines = [
        "| | " + " | ".join(f"{n}: {METRICS[n]} | {n}: SQNR dB" for n in names) + " |",
        "|---|" + "---:|---:|" * len(names),
    ]
    for label in dict.fromkeys(label for _, label in rows):
        found = [rows.get((name, label)) for name in names]
        cells = [f"{cell(r, 'score', 3)} | {cell(r, 'sqnr_db')}" for r in found]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("stories", "stories-text", "minilm", "sts", "text"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", help="rows whose label this regular expression finds")
    add_options(parser, "language.json")
    args = parser.parse_args()
    results = Results(args.results, {"samples": args.samples}, args.keep)
    if args.stories and args.stories_text:
        loaded = load_model(args.stories)
        for seed in args.seeds:
            run_all("stories260K", Stories(loaded, args.stories_text, args.samples, seed), results, seed, args.only)
    if args.minilm and args.sts and args.text:
        loaded = load_model(args.minilm, task="feature-extraction")
        for seed in args.seeds:
            bench = Similarity(loaded, args.sts, args.text, args.samples, seed)
            run_all("MiniLM-L6", bench, results, seed, args.only)
    print(tables(results.rows()))


if __name__ == "__main__":
    main()
