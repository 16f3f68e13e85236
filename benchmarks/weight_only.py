"""Weights alone at 4 bits beside onnxruntime's own `MatMulNBitsQuantizer`: nats a token, and milliseconds a token.

    python benchmarks/weight_only.py --stories FOLDER --stories-text tinystories_sample.txt
    python benchmarks/weight_only.py --layers 4 --width 2048

Groups of 32, all under ONNX Runtime. On stories260K (see `stories260k.py`), calibrated on stories that it generates
itself as in `language_accuracy.py`, the nats per token of held-out stories. On a LLaMA of random weights (speed does
not depend on them) one token after a context, with a float cache. GPTQ of onnxruntime needs neural-compressor, and is
left out where that is not installed.

Sessions have one thread, take turns, and the median over all turns counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from decoding import FAST, add_models, random_llama, step
from language_accuracy import Stories
from onnx import numpy_helper
from results import Key, Results, Values, add_options
from torch import Tensor

from repquant_fx import Recipe, compile
from repquant_fx.frontends.loading import load_model
from repquant_fx.frontends.memory import from_memory
from repquant_fx.generation import float_model
from repquant_fx.options import Source
from repquant_fx.runtime import session

GROUP, BITS = 32, 4
OURS: dict[str, dict[str, Any]] = {
    "ours, to nearest": {"gptq": False, "correction": False},
    "ours, GPTQ": {"correction": False},
    "ours": {},
}


def with_constant_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Weights that are transposed when the model runs, transposed: onnxruntime's quantizer looks for constants."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in constants]:
        order = next(a.ints for a in node.attribute if a.name == "perm")
        value = numpy_helper.to_array(constants[node.input[0]]).transpose(list(order))
        proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        proto.graph.node.remove(node)
    return proto


def onnxruntimes(proto: onnx.ModelProto, calibration: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Any]]:
    """What its quantizer makes of a float model, by each of its methods that runs here."""
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    methods: dict[str, Callable[[], Any]] = {
        "rounding": lambda: tool.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False, bits=BITS),
        "HQQ": lambda: tool.HQQWeightOnlyQuantConfig(block_size=GROUP, bits=BITS),
        "k-quant": lambda: tool.KQuantWeightOnlyQuantConfig(),
    }
    if find_spec("neural_compressor") is not None and calibration is not None:
        methods["GPTQ"] = lambda: tool.GPTQWeightOnlyQuantConfig(_Reader(calibration), block_size=GROUP, actorder=True)
    for name, config in methods.items():
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        try:
            quantizer = tool.MatMulNBitsQuantizer(copy, bits=BITS, block_size=GROUP, algo_config=config())
            quantizer.process()
        except Exception as error:  # what it needs differs from version to version
            print(f"MatMulNBitsQuantizer, {name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        yield f"MatMulNBitsQuantizer, {name}", quantizer.model.model


class _Reader:
    """Calibration data as onnxruntime takes it, sample by sample."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        count = len(next(iter(data.values())))
        self._samples = iter([{k: v[i:i + 1].numpy() for k, v in data.items()} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._samples, None)


def accuracy(folder: Path, text: Path, samples: int) -> list[tuple[str, float, float, float]]:
    """Rows of name, nats per token at the accuracy levels 1 and 4, megabytes."""
    loaded = load_model(folder)
    bench = Stories(loaded, text, samples, seed=0)

    def score(proto: onnx.ModelProto, level: int) -> float:
        runner = session(proto, threads=1, accuracy_level=level)

        def predict(ids: Tensor, mask: Tensor) -> Tensor:
            given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            taken = {entry.name: entry for entry in runner.get_inputs()}
            given |= {name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
                      for name, entry in taken.items() if name.startswith("past")}
            if "position_ids" in taken:
                given["position_ids"] = np.arange(ids.shape[1])[None]
            return torch.from_numpy(runner.run(["logits"], given)[0])

        return bench.measure(predict)

    plain = with_constant_weights(float_model(Source(loaded)).inlined())
    protos: dict[str, Any] = {"float": plain, **dict(onnxruntimes(plain, bench.calibration))}
    for label, changes in OURS.items():
        recipe = Recipe(wbits=BITS, abits="none", group_size=GROUP, **changes)  # type: ignore[arg-type]
        protos[label] = compile(loaded, bench.calibration, recipe, samples=samples, check=False).proto
    return [(label, score(proto, 1), score(proto, 4), proto.ByteSize() / 1e6) for label, proto in protos.items()]


def speed(layers: int, width: int, context: int, turns: int) -> dict[str, float]:
    """Median milliseconds of a token after a context, by row."""
    loaded = from_memory(random_llama(layers, width))
    data = {"input_ids": torch.randint(3, 1000, (18, 32))}
    plain = with_constant_weights(float_model(Source(loaded)).inlined())
    theirs = dict(list(onnxruntimes(plain, None))[:1])
    recipe = Recipe(wbits=BITS, abits="none", group_size=GROUP, **FAST)  # type: ignore[arg-type]
    ours = compile(loaded, data, recipe, samples=18, check=False).proto
    del loaded
    rows = {"float": (plain, 1), **{f"{k}, level 4": (v, 4) for k, v in theirs.items()}, "ours, level 4": (ours, 4),
            "ours, level 1": (ours, 1)}
    steps = {k: step(session(proto, threads=1, accuracy_level=level), context) for k, (proto, level) in rows.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(turns + 1):
        for label, run in steps.items():
            for _ in range(3):
                start = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    times[label].append(1e3 * (time.perf_counter() - start))
    return {label: statistics.median(spent) for label, spent in times.items()}


NATS, SPEED = "nats per token", "milliseconds"


def tables(rows: dict[Key, dict[int, Values]]) -> dict[str, str]:
    """Markdown by section: nats per token and size; milliseconds of a token, a section for each shape."""
    found = {}
    for key, seeds in rows.items():
        values = seeds[0]
        if key == (NATS,):
            lines = ["| | nats per token | at level 4 | MB |", "|---|---:|---:|---:|"]
            lines += [f"| {label} | {exact:.3f} | {quick:.3f} | {size:.2f} |"
                      for label, (exact, quick, size) in values.items()]
        else:
            lines = ["| | ms a token | times float |", "|---|---:|---:|"]
            lines += [f"| {label} | {spent:.1f} | {values['float'] / spent:.2f} |" for label, spent in values.items()]
        found[", ".join(key)] = "\n".join(lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser, width=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=31)
    parser.add_argument("--turns", type=int, default=15)
    add_options(parser, "weight_only.json", seeds=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results, {}, args.keep)
    if args.stories:
        results.measure((NATS,), 0, lambda: {
            label: figures for label, *figures in accuracy(args.stories, args.stories_text, args.samples)})
    else:
        shape = f"{args.layers} layers of {args.width}, after {args.context} tokens"
        results.measure((SPEED, shape), 0, lambda: dict(speed(args.layers, args.width, args.context, args.turns)))
    print("\n\n".join(tables(results.rows()).values()))


if __name__ == "__main__":
    main()
