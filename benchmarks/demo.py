"""What `make demo` runs: compile a small real transformer, run it under ONNX Runtime, print accuracy, size and speed
beside float.

    python benchmarks/demo.py [--data FOLDER] [--images 2000] [--model vit|swin] [--verbose]

FOLDER holds CIFAR-10 as class folders of images in `train` and `test`, or the same in `train.tar` and `test.tar`.
Without it the folders `cifar10` under `$REPQUANT_FX_DATA`, `data`, `../data` and `../shared/data` are tried. Where
there are no images the demo still compiles and runs, on random inputs, and compares with float instead of with labels.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from repquant_fx import Recipe, compile
from repquant_fx.calibration.data import load_calibration
from repquant_fx.calibration.inputs import InputSpec
from repquant_fx.evaluation import labelled_folder
from repquant_fx.frontends.loading import LoadedModel, load_model
from repquant_fx.parity import sqnr
from repquant_fx.report import checked, free_running

HERE = Path(__file__).parent
BITS = [(8, 8), (4, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", choices=("vit", "swin"), default="vit")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--verbose", action="store_true", help="also how far the codes part when each runs freely")
    args = parser.parse_args()
    weights = HERE / f"weights/{args.model}_cifar10.safetensors"
    loaded = load_model(weights)
    print(f"model: {weights.name}, {sum(p.numel() for p in loaded.module.parameters()) / 1e6:.2f} M parameters")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or find_data()
        if folder is None:
            print("no CIFAR-10 images found (see --help): random inputs, compared with float only")
            calibration, images, labels = torch.randn(args.samples, 3, 32, 32), torch.randn(256, 3, 32, 32), None
        else:
            print(f"images: {args.samples} to calibrate and {args.images} to test, from {folder}")
            calibration, images, labels = read(folder, loaded, args.samples, args.images, Path(scratch))
        table(loaded, calibration, images, labels, Path(scratch), args.verbose)


def find_data() -> Path | None:
    """The first folder `cifar10` that holds images."""
    given = os.environ.get("REPQUANT_FX_DATA")
    roots = [Path(given)] if given else [HERE.parent / p for p in ("data", "../data", "../shared/data")]
    for root in roots:
        folder = (root / "cifar10").resolve()
        if any((folder / name).exists() for name in ("train", "train.tar")) and any(
            (folder / n).exists() for n in ("test", "test.tar")
        ):
            return folder
    return None


def read(folder: Path, loaded: LoadedModel, samples: int, count: int, scratch: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration images, test images and their labels, preprocessed."""
    train, test = (part(folder, name, n, scratch) for name, n in (("train", samples), ("test", count)))
    shape = tuple(loaded.example_inputs[0].shape[1:])
    calibration = load_calibration(
        str(train), [InputSpec("x", (None, *shape), torch.float32)], preprocessing=loaded.preprocessing, samples=samples
    )
    batches = list(labelled_folder(str(test), loaded.preprocessing, shape, 250, count, 0))
    return (
        torch.cat([b[0] for b in calibration.batches]),
        torch.cat([x for x, _ in batches]),
        torch.cat([y for _, y in batches]),
    )


def part(folder: Path, name: str, count: int, scratch: Path) -> Path:
    """A class folder; of an archive, a random subset is unpacked."""
    if (folder / name).is_dir():
        return folder / name
    with tarfile.open(folder / f"{name}.tar") as archive:
        members = [m for m in archive.getmembers() if m.isfile()]
        archive.extractall(
            scratch / name, members=random.Random(0).sample(members, min(count, len(members))), filter="data"
        )
    inner = scratch / name
    while len(children := [c for c in inner.iterdir() if c.is_dir()]) == 1:  # the archive may have a top folder
        inner = children[0]
    return inner


def table(
    loaded: LoadedModel, calibration: Tensor, images: Tensor, labels: Tensor | None, scratch: Path, verbose: bool
) -> None:
    assert loaded.module is not None
    path = scratch / "float.onnx"
    torch.onnx.export(
        loaded.module,
        loaded.example_inputs,
        str(path),
        dynamo=True,
        opset_version=21,
        input_names=["x"],
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
    )
    files = {"float": path}
    for w, a in BITS:
        start = time.perf_counter()
        result = compile(loaded, recipe=Recipe(wbits=w, abits=a), calibration=calibration, samples=len(calibration))
        parity = result.report["parity"]
        print(f"compiled W{w}A{a} in {time.perf_counter() - start:.0f} s; {checked(parity)}")
        if verbose:
            print(free_running(parity))
        files[f"W{w}A{a}"] = result.save(scratch / f"w{w}a{a}.onnx")
    sessions = {name: single_thread(file) for name, file in files.items()}
    logits = {name: torch.cat([run(s, x) for x in images.split(250)]) for name, s in sessions.items()}
    latency = alternate(sessions, images[:16])
    print(
        f"\n{'':8s} {'top-1 %' if labels is not None else '':>8s} {'SQNR dB':>8s} {'file MB':>8s} "
        f"{'latency / float':>16s}"
    )
    for name, file in files.items():
        top = (
            f"{100 * float((logits[name].argmax(1) == labels).double().mean()):8.2f}" if labels is not None else " " * 8
        )
        noise = "       -" if name == "float" else f"{sqnr(logits[name], logits['float']):8.2f}"
        print(f"{name:8s} {top} {noise} {file.stat().st_size / 1e6:8.2f} {latency[name] / latency['float']:16.2f}")
    print("\n(latency: ratio of medians over alternating runs of a batch of 16 on one thread)")


def single_thread(file: Path) -> onnxruntime.InferenceSession:
    from repquant_fx import session

    return session(file, threads=1)


def run(runner: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(runner.run(None, {runner.get_inputs()[0].name: x.numpy()})[0]))


def alternate(sessions: dict[str, Any], x: Tensor, rounds: int = 40) -> dict[str, float]:
    """Median seconds of each session, runs interleaved so that noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for index in range(rounds + 5):
        for name, runner in sessions.items():
            start = time.perf_counter()
            run(runner, x)
            if index >= 5:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
