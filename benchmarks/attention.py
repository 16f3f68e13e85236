"""The two ends of attention under ONNX Runtime: ways to multiply the log2 codes with the values, and what a kernel of
our own could gain.

    python benchmarks/attention.py [--heads 6 --tokens 197 --dim 64] [--model model.onnx --layers 12] [--results
    attention.json]

Every variant is one attention from integer codes of query, key and value to the float result; all sessions are in this
process, on one thread, and take turns. Ratios of medians.

- log2, float product: what the compiler writes. Log2Softmax gives the exact powers, which multiply the dequantized
  values in float;
- log2, 8-bit product: the powers rounded to uniform 8-bit codes, so that the product is an integer kernel; its error is
  printed;
- two 8-bit products, operands given: even and odd codes apart (the second times sqrt 2), each exact in 8 bits where
  codes have 4 bits. Splitting the codes is left out here, so this is less than such a form could take;
- uniform 8-bit: Softmax on a uniform grid, integer product;
- softmax in float: no quantization of the probabilities at all.

A kernel of our own for Log2Softmax could at best take as long as Softmax alone. With `--model` that gain is put in
relation to a whole model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from results import Key, Results, Values, add_options

from repquant_fx import session
from repquant_fx.exporters import functions

BITS, STEPS, SCALE = 4, 2, 0.5
GAIN = "most that a kernel could gain of a whole model"


def attention(kind: str, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """One attention, codes in, float out."""
    heads, tokens, dim = shape
    make, constants = (
        helper.make_node,
        {
            "one": np.float32(0.02),
            "zero": np.uint8(128),
            "scale": np.float32(SCALE),
            "byte": np.float32(1 / 255),
            "none": np.uint8(0),
            "half": np.float32(SCALE / 255),
        },
    )

    def dequantize(name: str, scale: str = "one", zero: str = "zero") -> onnx.NodeProto:
        return make("DequantizeLinear", [name, scale, zero], [f"{name}_float"])

    codes = {name: (TensorProto.UINT8, [1, heads, *size]) for name, size in
             {"q": (tokens, dim), "k": (dim, tokens), "v": (tokens, dim)}.items()}
    nodes = [dequantize("q"), dequantize("k"), make("MatMul", ["q_float", "k_float"], ["scores"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, heads, tokens, dim])]
    if kind.startswith(("log2", "two")):
        nodes.append(
            make(
                "Log2Softmax",
                ["scores", "scale"],
                ["p"],
                domain=functions.DOMAIN,
                axis=-1,
                bits=BITS,
                steps=STEPS,
                threshold=functions.threshold(SCALE, BITS, STEPS),
            )
        )
    else:
        nodes.append(make("Softmax", ["scores"], ["p"], axis=-1))
    nodes.append(dequantize("v"))
    if kind in ("log2, float product", "softmax in float"):
        nodes.append(make("MatMul", ["p", "v_float"], ["y"]))
    elif kind == "two 8-bit products, operands given":
        # its codes are what would be split
        outputs.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, heads, tokens, tokens]))
        for part in ("even", "odd"):
            codes[part] = (TensorProto.UINT8, [1, heads, tokens, tokens])
            nodes += [dequantize(part, "byte", "none"), make("MatMul", [f"{part}_float", "v_float"], [f"{part}_y"])]
        nodes.append(make("Add", ["even_y", "odd_y"], ["y"]))
    else:
        step = "half" if kind.startswith("log2") else "byte"
        nodes += [make("QuantizeLinear", ["p", step, "none"], ["codes"]), dequantize("codes", step, "none"),
                  make("MatMul", ["codes_float", "v_float"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in codes.items()],
        outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[functions.log2_softmax()], ir_version=10)


VARIANTS = (
    "log2, float product",
    "log2, 8-bit product",
    "two 8-bit products, operands given",
    "uniform 8-bit",
    "softmax in float",
)


def feed(model: Any, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Random codes; float inputs of a whole model as standard normal numbers, its batch 1."""
    values = {}
    for each in model.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in each.shape]
        if each.type == "tensor(uint8)":
            values[each.name] = generator.normal(128, 30, shape).clip(0, 255).astype(np.uint8)
        else:
            values[each.name] = generator.standard_normal(shape).astype(np.float32)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--model", type=Path, help="an exported model with such attentions, float inputs")
    parser.add_argument("--layers", type=int, default=12, help="how many it has")
    parser.add_argument("--turns", type=int, default=60)
    add_options(parser, None, seeds=False)
    options = parser.parse_args()
    model = options.model.name if options.model else None
    settings = {"model": model, "layers": options.layers, "turns": options.turns}
    shape = (options.heads, options.tokens, options.dim)
    results = Results(options.results, settings, options.keep)
    results.measure(("attention", " x ".join(map(str, shape))), 0, lambda: compare(options, shape))
    print(table(results.rows()))


def compare(options: argparse.Namespace, shape: tuple[int, int, int]) -> Values:
    """Milliseconds of every variant, the error of the rounded powers, and what a whole model could gain."""
    sessions = {kind: session(attention(kind, shape).SerializeToString(), threads=1) for kind in VARIANTS}
    if options.model:
        sessions["model"] = session(options.model, threads=1)
    inputs = {kind: feed(each, np.random.default_rng(0)) for kind, each in sessions.items()}
    outputs = {kind: each.run(None, inputs[kind])[0] for kind, each in sessions.items()}
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(options.turns):
        for kind, each in sessions.items():
            start = time.perf_counter()
            for _ in range(1 if kind == "model" else 5):
                each.run(None, inputs[kind])
            times[kind].append((time.perf_counter() - start) / (1 if kind == "model" else 5))
    median = {kind: statistics.median(t) for kind, t in times.items()}
    base = median[VARIANTS[0]]
    found: Values = {
        "shape": shape,
        "milliseconds": {kind: 1e3 * median[kind] for kind in VARIANTS},
        "time over log2, float product": {kind: round(median[kind] / base, 3) for kind in VARIANTS},
    }
    exact, rounded = (outputs[kind].astype(np.float64) for kind in VARIANTS[:2])
    found["sqnr of the 8-bit product"] = round(
        float(10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum())), 1
    )
    if options.model:
        gain = options.layers * (base - median["softmax in float"]) / median["model"]
        found[GAIN] = round(gain, 3)
    return found


def table(rows: dict[Key, dict[int, Values]]) -> str:
    """Markdown: the time of each way over that of the first; in words, what the rounded product costs and what a faster
    Softmax would save.
    """
    found = next(iter(rows.values()))[0]
    lines = [f"| | times as long as `{VARIANTS[0]}` |", "|---|---:|"]
    lines += [f"| {kind} | {times:.2f} |" for kind, times in found["time over log2, float product"].items()]
    lines += ["", f"The 8-bit product against the exact powers: {found['sqnr of the 8-bit product']} dB."]
    if GAIN in found:
        lines[-1] += f" A Log2Softmax as fast as Softmax would save at most {100 * found[GAIN]:.1f} % of the model."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
