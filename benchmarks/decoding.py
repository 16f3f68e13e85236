"""Decoding with a key/value cache: milliseconds a token after contexts of several lengths, and perplexity through it.

    python benchmarks/decoding.py --stories FOLDER --stories-text tinystories_sample.txt
    python benchmarks/decoding.py --layers 4 --width 512

Either stories260K as `stories260k.py` makes it, with the nats per token of a text, or a LLaMA of random weights (speed
does not depend on them). Rows, all under ONNX Runtime:

- float with a cache: the same graph without quantizers;
- W8A8 with a cache of codes, and with one in float;
- W8A8 of whole sequences, which computes all tokens again for each.

Sessions have one thread, take turns, and the median over all turns counts. A step is measured at its context; what it
gives is dropped.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Key, Results, Values, add_options
from torch import nn

from repquant_fx import Recipe, compile
from repquant_fx.calibration.text import read_text
from repquant_fx.evaluation import evaluate
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.frontends.memory import from_memory
from repquant_fx.frontends.past import is_cache, output_name
from repquant_fx.generation import float_model
from repquant_fx.options import Source
from repquant_fx.runtime import session

FAST: dict[str, Any] = {"gptq": False, "correction": False, "clipping": "none", "activations": "minmax",
                        "weights": "minmax", "softmax_scale": "percentile"}
ROWS: dict[str, dict[str, Any]] = {
    "W8A8, cache of codes": {"with_past": True},
    "W8A8, float cache": {"with_past": True, "cache": "float"},
    "W8A8, whole sequences": {},
}
FLOAT = "float, cache"


def random_llama(layers: int, width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=2048))


def files(loaded: LoadedModel, calibration: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model of each row, as a proto."""
    found: dict[str, Any] = {FLOAT: float_model(Source(loaded)).inlined()}
    for label, options in ROWS.items():
        changes = {key: value for key, value in options.items() if key != "with_past"}
        made = compile(loaded, calibration, Recipe(**settings, **changes), samples=32, seq_len=128, check=False,
                       with_past=options.get("with_past", False))
        found[label] = made.proto
    return found


def step(runner: Any, context: int) -> Callable[[], object]:
    """What makes one more token after a context."""
    inputs = {entry.name: entry for entry in runner.get_inputs()}
    ids = np.random.default_rng(0).integers(3, 500, (1, context + 1))

    def feed(tokens: np.ndarray, old: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        given = {"input_ids": tokens, "attention_mask": np.ones((1, count), np.int64), **old}
        if "position_ids" in inputs:
            given["position_ids"] = np.arange(count - tokens.shape[1], count)[None]
        return given

    caches = [name for name in inputs if is_cache(name)]
    if not caches:
        return lambda: runner.run(["logits"], feed(ids, {}, context + 1))
    kinds = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
    empty = {name: np.zeros((1, inputs[name].shape[1], 0, inputs[name].shape[3]), kinds[inputs[name].type])
             for name in caches}
    values = runner.run([output_name(name) for name in caches], feed(ids[:, :-1], empty, context))
    last = feed(ids[:, -1:], dict(zip(caches, values)), context + 1)
    return lambda: runner.run(None, last)


def milliseconds(protos: Mapping[str, Any], context: int, turns: int = 5, least: float = 0.2) -> dict[str, float]:
    """Median time of a step, by row."""
    steps = {label: step(session(proto, threads=1), context) for label, proto in protos.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(turns + 1):
        for label, run in steps.items():
            end, count = time.perf_counter() + least, 0
            while time.perf_counter() < end or count < 3:
                start = time.perf_counter()
                run()
                count += 1
                if turn:  # the first one warms up
                    times[label].append(1e3 * (time.perf_counter() - start))
    return {label: statistics.median(spent) for label, spent in times.items()}


def nats(protos: Mapping[str, Any], text: Path, tokenizer: str) -> dict[str, float]:
    """Nats per token of a text whose documents are separated by <|endoftext|>."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, proto in protos.items():
            path = Path(folder) / "model.onnx"
            path.write_bytes(proto.SerializeToString())
            result = evaluate(str(path), str(text), tokenizer=tokenizer, separator="<|endoftext|>", seq_len=512,
                              threads=1)
            found[label] = result.nats_per_token  # type: ignore[union-attr]
    return found


def tables(rows: dict[Key, dict[int, Values]]) -> dict[str, str]:
    """Markdown: a section for each model."""
    found = {}
    for (model,), seeds in rows.items():
        contexts, times, scores = (seeds[0][name] for name in ("contexts", "milliseconds", "nats"))
        head = [*(f"ms a token after {c}" for c in contexts), *(["nats a token"] if scores else [])]
        lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
        for label in times[0]:
            cells = [f"{each[label]:.2f}" for each in times] + ([f"{scores[label]:.3f}"] if scores else [])
            lines.append(f"| {label} | {' | '.join(cells)} |")
        found[model] = "\n".join(lines)
    return found


def add_models(parser: argparse.ArgumentParser, width: int) -> None:
    """Switches: stories260K and its text, or the shape of a LLaMA with random weights."""
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--stories-text", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=width)


def measure(args: argparse.Namespace) -> Values:
    """Milliseconds a token after each context, and nats a token where there is text."""
    scores: dict[str, float] = {}
    if args.stories:
        loaded = load_model(args.stories)
        read_text(args.stories_text)  # says what is wrong with it before anything is compiled
        protos = files(loaded, args.stories_text, {})
        scores = nats(protos, args.stories_text, str(args.stories))
    else:
        loaded = from_memory(random_llama(args.layers, args.width))
        protos = files(loaded, {"input_ids": torch.randint(3, 1000, (32, 128))}, FAST)
    contexts = [c for c in args.contexts if c < (512 if args.stories else math.inf)]
    return {"contexts": contexts, "milliseconds": [milliseconds(protos, each) for each in contexts], "nats": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser, width=512)
    parser.add_argument("--contexts", type=int, nargs="+", default=[31, 127, 511])
    add_options(parser, "decoding.json", seeds=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results, {"contexts": args.contexts}, args.keep)
    name = "stories260K" if args.stories else f"LLaMA, {args.layers} layers of {args.width}"
    results.measure((name,), 0, lambda: measure(args))
    print("\n\n".join(tables(results.rows()).values()))


if __name__ == "__main__":
    main()
