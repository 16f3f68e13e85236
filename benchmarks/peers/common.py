"""What the peers share: our weights in their model, the calibration and test images of `accuracy.py`, and the figures.

    python benchmarks/peers/NAME.py CHECKOUT --calib train_folder --data test_folder [--bits W4A4 W3A3]

CHECKOUT is a copy of the peer's official repository; its commit is read with git, or given where the folder is an
unpacked archive. The peer's own script runs from beginning to end, as its command line would run it. Changed from
outside, and nothing else:

- `timm.create_model` gives our model, with our weights;
- its data loaders give our calibration images, in our preprocessing (calibration is without labels: they are zeros);
- its validation hands over the model that it would measure, and we measure that: top-1 and SQNR of the logits against
  the float model, under torch, as the peers compute with quantized values in float and write no file that a runtime
  executes;
- `Tensor.cuda` and `Module.cuda` do nothing, so that it runs on the CPU;
- where the installed timm is newer than the peer: attention accepts the mask that timm now hands to it (None), and
  modules that do nothing are functions, so that a walk over all modules finds those that the peer expects.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # the scripts beside this folder

from accuracy import MODELS, Bench, bits_of
from results import Results, Values, accuracy_table, add_options, git

from repquant_fx.frontends.loading import load_model

BATCH = 32
SEEN = "the patch embedding's input has 8 bits and its weights W; the head has W and A bits"  # as ours by default


@dataclass(frozen=True)
class Task:
    """What a peer is to quantize.

    Attributes:
        checkout: the peer's repository.
        model: timm's, in float; it may be changed.
        family: `vit` or `swin`.
        calibration: images (N, 3, H, W).
        wbits, abits: bits of weights and activations.
        seed: of the peer's random numbers.
        options: of the command line.
    """

    checkout: Path
    model: nn.Module
    family: str
    calibration: Tensor
    wbits: int
    abits: int
    seed: int
    options: argparse.Namespace

    def batches(self, count: int | None = None, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
        """The calibration images, or the first of them, with zeros for labels."""
        return [(x, torch.zeros(len(x), dtype=torch.int64)) for x in self.calibration[:count].split(size)]


Quantize = Callable[[Task], nn.Module]


# ---- running a peer's script -----------------------------------------------------------------------------------------


def identity(x: Any) -> Any:
    return x


def without_identities(model: nn.Module) -> nn.Module:
    """Replace every `nn.Identity` that is an attribute by a function: older timm had fewer of them."""
    for module in model.modules():
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Identity) and not isinstance(module, nn.Sequential):
                del module._modules[name]
                setattr(module, name, identity)
    return model


def without_mask(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention of older timm, under newer timm, which says that there is no mask."""

    def attention(self: nn.Module, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise NotImplementedError("the peer's attention knows no mask")
        return forward(self, x)

    return attention


def load_script(path: Path) -> ModuleType:
    """A script of a peer as a module, its own folder first on the path. What it imports from there is new, too.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: give the folder of the peer's official checkout")
    folder = str(path.parent)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(folder):
            del sys.modules[name]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@contextmanager
def surroundings(model: nn.Module) -> Iterator[None]:
    """What a peer's script finds: our model in timm, no CUDA, a folder of its own to write into."""
    import timm

    threads, back = torch.get_num_threads(), Path.cwd()
    with tempfile.TemporaryDirectory() as scratch, \
            mock.patch.object(timm, "create_model", lambda *_, **__: without_identities(copy.deepcopy(model))), \
            mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self), \
            mock.patch.object(nn.Module, "cuda", lambda self, *_, **__: self), \
            mock.patch("builtins.print"):
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(back)
            torch.set_num_threads(threads)


class Handed:
    """Stands in for a script's `validate(...)`: keeps the model that it is called with last."""

    def __init__(self, position: int) -> None:
        self.position, self.model = position, None

    def __call__(self, *arguments: Any, **_: Any) -> tuple[float, float, float]:
        self.model = arguments[self.position]
        return 0.0, 0.0, 0.0


# ---- the table -------------------------------------------------------------------------------------------------------


def commit_of(checkout: Path, given: str | None) -> str:
    """The commit of a checkout.

    Raises:
        SystemExit: git does not tell, and none was given.
    """
    found = given or (git("rev-parse", "HEAD", folder=checkout) if (checkout / ".git").exists() else None)
    if found is None:
        raise SystemExit(f"{checkout} is no git checkout: say its commit with --commit")
    return found


def arguments(name: str, doc: str | None, steps: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the official checkout")
    parser.add_argument("--commit", help="of the checkout, where git does not tell")
    parser.add_argument("--calib", required=True, help="image folder to calibrate with")
    parser.add_argument("--data", required=True, help="class folders to evaluate on")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=bits_of, default=[(4, 4), (3, 3)], help="such as W4A4 (W4A4 W3A3)")
    parser.add_argument("--samples", type=int, default=1024, help="calibration images (%(default)s)")
    parser.add_argument("--images", type=int, help="test images, a random subset (all)")
    if steps:
        parser.add_argument("--steps", type=int, help="of optimization for each block (the peer's own number)")
    add_options(parser, f"peer_{name}.json")
    return parser


def run(name: str, doc: str | None, quantize: Quantize, *, rules: str = SEEN, steps: bool = False,
        options: Sequence[tuple[str, dict[str, Any]]] = ()) -> None:
    """The command line of a peer.

    Args:
        name: of the peer, as a table shows it.
        doc: what the script is.
        quantize: gives the quantized model, which takes images and gives logits.
        rules: what holds for the first and the last layer.
        steps: whether the peer optimizes, so that a number of steps can be given.
        options: further ones, as for `add_argument`.
    """
    parser = arguments(Path(sys.argv[0]).stem, doc, steps)
    for flag, about in options:
        parser.add_argument(flag, **about)
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    known = ("calib", "data", "models", "bits", "seeds", "results", "keep", "checkout", "commit")
    settings = {key: value for key, value in vars(args).items() if key not in known}
    settings |= {"peer commit": commit_of(checkout, args.commit), "rules": rules}
    results = Results(args.results.resolve(), settings, args.keep)
    calib, data = (str(Path(each).resolve()) for each in (args.calib, args.data))
    for model in args.models:
        for seed in args.seeds:
            bench = Bench(model, load_model(MODELS[model]), calib, data, args.samples, seed, args.images)
            results.measure((model, "float"), seed, lambda bench=bench: bench.measure(bench.as_float))
            for w, a in args.bits:
                found, _ = results.measure((model, f"{name} W{w}A{a}"), seed,
                                           lambda b=bench, w=w, a=a: measured(b, checkout, quantize, w, a, args))
                print(f"{model} {name} W{w}A{a} seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()),
                      flush=True)
    print(accuracy_table(results.rows()))
    print(f"\n{name} at commit {settings['peer commit'][:12]}, under torch; {rules}.")


def measured(bench: Bench, checkout: Path, quantize: Quantize, w: int, a: int, args: argparse.Namespace) -> Values:
    module = bench.loaded.module
    assert module is not None
    torch.manual_seed(bench.seed)
    start = time.perf_counter()
    task = Task(checkout, copy.deepcopy(module), bench.name.lower(), bench.calibration, w, a, bench.seed, args)
    with surroundings(task.model):  # some peers call Tensor.cuda whenever their model runs
        model = quantize(task).eval()
        seconds = time.perf_counter() - start

        def predict(images: Tensor) -> Tensor:
            with torch.no_grad():
                return model(images)

        return {**bench.measure(predict), "quantize_seconds": seconds}
