"""Inference speed under ONNX Runtime on the CPU: ours beside float and beside ONNX Runtime's own quantizer. Prints
ratios.

    python benchmarks/latency.py --models deit_small --batches 1 8 --threads 1 2 [--work FOLDER] [--results
    latency.json]

Weights are random: speed does not depend on them. Every variant runs in a process of its own with one session; the
processes take turns, a few runs each, and the ratio is that of the medians over all turns. Variants:

- float: torch.onnx.export of the model;
- peer: `quantize_static`, QDQ, per-channel int8 weights, uint8 activations, after its own pre-processing; all operators
  it knows;
- peer, products: the same, restricted to MatMul, Gemm and Conv (its best variant: Softmax, LayerNorm, GELU and
  additions stay float);
- W8A8, W6A6, W4A4: ours.

Figures that `--results` already holds for the same commit and machine are not measured again (`results.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Key, Results, Values, add_options
from torch import Tensor, nn

from repquant_fx import Recipe, compile

BITS = [(8, 8), (6, 6), (4, 4)]
LENGTH, VOCABULARY = 128, 1000
# what takes time in compiling and not in running is off
FAST = {
    "gptq": False,
    "correction": False,
    "clipping": "none",
    "activations": "minmax",
    "weights": "minmax",
    "softmax_scale": "percentile",
}


@dataclass(frozen=True)
class Entry:
    """A model and how to make inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


def image(side: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"x": torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))}


def tokens(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)
    return build


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            word_embed_proj_dim=512,
            ffn_dim=2048,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                intermediate_size=1536), add_pooling_layer=False)


MODELS = {
    "deit_tiny": Entry(timm("deit_tiny_patch16_224"), image(224)),
    "deit_small": Entry(timm("deit_small_patch16_224"), image(224)),
    "vit_base": Entry(timm("vit_base_patch16_224"), image(224)),
    "swin_tiny": Entry(timm("swin_tiny_patch4_window7_224"), image(224)),
    "opt": Entry(opt, tokens),
    "llama": Entry(llama, tokens),
    "minilm": Entry(minilm, tokens),
}


def write_variants(name: str, folder: Path, wanted: set[str] | None = None) -> dict[str, Path]:
    """The files of all variants; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = MODELS[name]
    torch.manual_seed(0)
    model = entry.build().eval()
    calibration = entry.inputs(8)
    files = {label: folder / f"{label.replace(', ', '_')}.onnx" for label in
             ["float", "peer", "peer, products", *(f"W{w}A{a}" for w, a in BITS)]}

    def missing(label: str) -> bool:
        return (wanted is None or label in wanted) and not files[label].exists()

    if not files["float"].exists():
        export_float(model, calibration, files["float"])
    for label, operators in (("peer", None), ("peer, products", ["MatMul", "Gemm", "Conv"])):
        if missing(label):
            quantize_static(files["float"], files[label], calibration, operators)
    for w, a in BITS:
        if missing(f"W{w}A{a}"):
            compiled(model, calibration, Recipe(wbits=w, abits=a, **FAST)).save(files[f"W{w}A{a}"])
    return {label: path for label, path in files.items() if path.exists()}


def compiled(model: nn.Module, calibration: dict[str, Tensor], recipe: Recipe) -> Any:
    return compile(
        model,
        recipe=recipe,
        calibration=calibration if "x" not in calibration else calibration["x"],
        batch_size=4,
        example_inputs={k: v[:2] for k, v in calibration.items()} if "x" not in calibration else [calibration["x"][:2]],
        check=False,
    )


class First(nn.Module):
    """The first output of a transformers model, so that exporters see a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def export_float(model: nn.Module, calibration: dict[str, Tensor], path: Path) -> None:
    text = "input_ids" in calibration
    batch = torch.export.Dim("batch", min=1)
    axes: Any = {0: batch, 1: torch.export.Dim("sequence", min=2, max=512)} if text else {0: batch}
    torch.onnx.export(
        First(model) if text else model,
        tuple(v[:2] for v in calibration.values()),
        str(path),
        dynamo=True,
        opset_version=21,
        input_names=list(calibration),
        dynamic_shapes=tuple(axes for _ in calibration),
        verbose=False,
        external_data=False,
    )


def quantize_static(source: Path, target: Path, calibration: dict[str, Tensor], operators: list[str] | None) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as peer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    count = len(next(iter(calibration.values())))
    batches = iter([{k: v[i:i + 4].numpy() for k, v in calibration.items()} for i in range(0, count, 4)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as scratch:
        prepared = str(Path(scratch) / "prepared.onnx")
        quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
        peer(
            prepared,
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=operators,
        )


# ---- measuring -------------------------------------------------------------------------------------------------------


def serve(path: str, inputs: str, threads: int) -> None:
    """A worker: reads how many runs to make, answers with their seconds."""
    from repquant_fx import session

    runner = session(path, threads=threads)
    with np.load(inputs) as stored:
        feed = {node.name: stored[node.name] for node in runner.get_inputs()}
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            runner.run(None, feed)
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def measure(files: dict[str, Path], inputs: dict[str, Tensor], threads: int, seconds: float) -> dict[str, float]:
    """Median seconds per run of each file, the files taking turns until `seconds` have passed for each."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "inputs.npz"
        np.savez(data, **{k: v.numpy() for k, v in inputs.items()})  # type: ignore[arg-type]
        workers = {
            label: subprocess.Popen(
                [sys.executable, __file__, "--serve", str(path), str(data), str(threads)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for label, path in files.items()
        }
        try:
            def ask(label: str, runs: int) -> list[float]:
                worker = workers[label]
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write(f"{runs}\n")
                worker.stdin.flush()
                return list(json.loads(worker.stdout.readline()))

            slowest = {label: statistics.median(ask(label, 3)) for label in workers}  # warm up
            turns = 12
            runs = {label: max(1, int(seconds / turns / s)) for label, s in slowest.items()}
            times: dict[str, list[float]] = {label: [] for label in workers}
            for _ in range(turns):
                for label in workers:
                    times[label] += ask(label, runs[label])
            return {label: statistics.median(t) for label, t in times.items()}
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "--serve":
        return serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--variants", nargs="*", help="measure these labels alone (float always)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of running a variant")
    parser.add_argument("--work", type=Path, help="keep the files of all variants here")
    add_options(parser, None, seeds=False)
    args = parser.parse_args()
    results = Results(args.results, {"seconds": args.seconds, "variants": args.variants}, args.keep)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            run_all(name, (args.work or Path(scratch)) / name, args, results)
    print(table(results.rows()))


def run_all(name: str, folder: Path, args: argparse.Namespace, results: Results) -> None:
    wanted = None if args.variants is None else {"float", *args.variants}

    @functools.cache
    def files() -> dict[str, Path]:
        return {k: v for k, v in write_variants(name, folder, wanted).items() if wanted is None or k in wanted}

    results.measure(
        (name, "megabytes"), 0, lambda: {label: path.stat().st_size / 1e6 for label, path in files().items()}
    )
    for threads in args.threads:
        for batch in args.batches:
            key = f"batch {batch}, threads {threads}"
            medians, _ = results.measure(
                (name, key), 0, lambda b=batch, t=threads: measure(files(), MODELS[name].inputs(b), t, args.seconds)
            )
            print(f"{name:11s} {key:20s} "
                  + "  ".join(f"{k} {medians['float'] / v:.2f}x" for k, v in medians.items()), flush=True)


def table(found: dict[Key, dict[int, Values]]) -> str:
    """Markdown: how many times faster than float at batch 1 on one thread, with file sizes; then ours beside the better
    peer elsewhere.
    """
    results: dict[str, dict[str, Values]] = {}
    for (name, key), values in found.items():
        results.setdefault(name, {})[key] = values[0]
    labels = list(dict.fromkeys(label for r in results.values() for label in r["megabytes"]))[1:]
    first, others = (
        "batch 1, threads 1",
        list(dict.fromkeys(key for r in results.values() for key in r if key not in ("megabytes",))),
    )
    lines = [
        "| | "
        + " | ".join(labels)
        + " | float MB | "
        + " | ".join(f"{x} MB" for x in labels if x.startswith("W"))
        + " |",
        "|---|" + "---:|" * (len(labels) + 1 + sum(x.startswith("W") for x in labels)),
    ]
    for name, rows in results.items():
        speed = [f"{rows[first]['float'] / rows[first][x]:.2f}" if x in rows.get(first, {}) else "" for x in labels]
        sizes = [
            f"{rows['megabytes'][x]:.1f}"
            for x in ("float", *(x for x in labels if x.startswith("W")))
            if x in rows["megabytes"]
        ]
        lines.append(f"| {name} | " + " | ".join([*speed, *sizes]) + " |")
    others = [key for key in others if key != first]
    if others:
        lines += ["", "| W8A8 / W4A4 (better peer) | " + " | ".join(others) + " |", "|---|" + "---:|" * len(others)]
    for name, rows in results.items() if others else ():
        cells = []
        for key in others:
            found = {label: rows[key]["float"] / seconds for label, seconds in rows.get(key, {}).items()}
            peer = max((ratio for label, ratio in found.items() if label.startswith("peer")), default=None)
            ours = " / ".join(f"{found[x]:.2f}" for x in ("W8A8", "W4A4") if x in found)
            cells.append(f"{ours} ({peer:.2f})" if peer is not None else ours)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
