"""All tables measured anew on one commit: every benchmark, one after the other.

    make tables                                        # hours; the same command goes on where it was interrupted
    python benchmarks/tables.py [--data FOLDER] [--only accuracy language] [--seeds 0 1 2]
    python benchmarks/tables.py --list

Each benchmark writes `benchmarks/results/NAME.json`: its rows with commit, versions, machine, settings and seed
(`results.py`), and prints its tables, with mean and standard deviation over the seeds. Only rows of this commit,
machine and versions are used again; `--keep` uses others, too. A work tree with changes is refused, because no commit
says what was measured, unless `--dirty`.

FOLDER is `$REPQUANT_FX_DATA`, `data`, `../data` or `../shared/data` by default, and holds what there is of `cifar10`,
`stories260k`, `stsb` and `wikitext2`, and `dinov2_cifar10.safetensors` as `dinov2.py` writes it. A benchmark whose data
is absent is left out, or a part of it, and named. `--peers` is a folder with the official checkouts of the peers, each
with the name of its repository (`peers/`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import results
from demo import find_data

HERE = Path(__file__).parent
PEERS = {"repq_vit": "RepQ-ViT", "fima_q": "FIMA-Q", "aphq_vit": "APHQ-ViT", "adalog": "AdaLog", "erq": "ERQ"}


@dataclass(frozen=True)
class Sources:
    """Where data and models are.

    Attributes:
        data: the folder of all data; None where there is none.
        work: for what is unpacked and prepared; kept, so that an interrupted run finds it again.
        peers: the folder of the peers' checkouts; None where there is none.
        download: let pip fetch the sentence encoder.
    """

    data: Path | None
    work: Path
    peers: Path | None = None
    download: bool = False

    def file(self, name: str) -> Path:
        """A file of the data.

        Raises:
            Absent: it is not there.
        """
        path = self.data / name if self.data else None
        if path is None or not path.exists():
            raise Absent(f"{name} is not in the data ({self.data or 'no folder found'})")
        return path

    def images(self) -> list[str]:
        """Switches with class folders of CIFAR-10, unpacked where they are archives."""
        found = []
        for switch, name in (("--calib", "train"), ("--data", "test")):
            if self.data and (self.data / "cifar10" / name).is_dir():
                folder = self.data / "cifar10" / name
            else:
                folder = self.prepared(f"cifar10/{name}", lambda to, n=name: unpack(self.file(f"cifar10/{n}.tar"), to))
            while len(inner := [each for each in folder.iterdir() if each.is_dir()]) == 1:
                folder = inner[0]  # an archive may have a top folder
            found += [switch, str(folder)]
        return found

    def language_model(self, name: str) -> Path:
        """A transformers directory that `language_models.py` prepares.

        Raises:
            Absent: it cannot be prepared.
        """
        import language_models

        def prepare(folder: Path) -> None:
            absent = (
                language_models.prepare_stories(self.data or Path(), folder) if name == "stories260K"
                else language_models.prepare_minilm(folder, self.download)
            )
            if absent:
                raise Absent(absent)

        return self.prepared(name, prepare)

    def prepared(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder of `work`, made if it is not there; it is there as a whole or not at all."""
        folder = self.work / name
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part{os.getpid()}")
            make(part)
            part.rename(folder)
        return folder


class Absent(Exception):
    """What a benchmark needs is not there; says what."""


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def some(sources: Sources, *parts: Callable[[Sources], list[str]]) -> list[str]:
    """The arguments of all parts whose data is there; of the others it is said why not.

    Raises:
        Absent: none is there.
    """
    found: list[str] = []
    reasons: list[str] = []
    for part in parts:
        try:
            found += part(sources)
        except Absent as reason:
            reasons.append(str(reason))
    if not found:
        raise Absent("; ".join(reasons))
    if reasons:
        print(f"a part is left out: {'; '.join(reasons)}", flush=True)
    return found


def sentences(sources: Sources) -> list[str]:
    return ["--minilm", str(sources.language_model("minilm")), "--text", str(sources.file("wikitext2/wiki.test.raw"))]


def pairs(sources: Sources) -> list[str]:
    return [*sentences(sources), "--sts", str(sources.file("stsb/stsb-en-dev.csv"))]


def stories(sources: Sources) -> list[str]:
    text = sources.file("stories260k/tinystories_sample.txt")
    return ["--stories", str(sources.language_model("stories260K")), "--stories-text", str(text)]


def dinov2(sources: Sources) -> list[str]:
    """The methods alone, on 1,000 test images of 224 px."""
    return ["--weights", str(sources.file("dinov2_cifar10.safetensors")), *sources.images(), "--samples", "128",
            "--images", "1000", "--sections", "methods"]


def measured_files(sources: Sources) -> Path:
    """Where `latency.py` leaves what this commit compiled, for `attention.py`."""
    return sources.work / f"latency-{results.commit() or 'unknown'}"


def attention(sources: Sources) -> list[str]:
    model = measured_files(sources) / "deit_small/W8A8.onnx"
    return ["--model", str(model), "--layers", "12"] if model.exists() else []


def peer(script: str) -> Callable[[Sources], list[str]]:
    def arguments(sources: Sources) -> list[str]:
        checkout = sources.peers / PEERS[script] if sources.peers else None
        if checkout is None or not checkout.is_dir():
            raise Absent(f"no checkout of {PEERS[script]} (--peers)")
        return [str(checkout), *sources.images()]

    return arguments


@dataclass(frozen=True)
class Benchmark:
    """A script and its arguments.

    Attributes:
        name: of the benchmark and of its JSON file.
        script: in `benchmarks/`, with the arguments that come first.
        arguments: from the data; raises Absent where it is not there.
        seeds: whether its figures depend on a seed.
    """

    name: str
    script: tuple[str, ...]
    arguments: Callable[[Sources], list[str]]
    seeds: bool = True

    def command(self, sources: Sources, seeds: Sequence[int], folder: Path, keep: bool) -> list[str]:
        """What to run.

        Raises:
            Absent: data or a model is not there.
        """
        script, *first = self.script
        chosen = ["--seeds", *map(str, seeds)] if self.seeds else []
        return [sys.executable, str(HERE / script), *first, *self.arguments(sources), *chosen,
                "--results", str(folder / f"{self.name}.json"), *(["--keep"] if keep else [])]


BENCHMARKS = (
    Benchmark("accuracy", ("accuracy.py",), Sources.images),
    Benchmark("reconstruction", ("reconstruction.py",), Sources.images),
    Benchmark("data_free", ("data_free.py",), Sources.images),
    Benchmark("targets", ("targets.py",), lambda s: []),
    Benchmark("mixed_precision", ("mixed_precision.py",), lambda s: some(s, Sources.images, pairs)),
    Benchmark("language", ("language_accuracy.py",), lambda s: some(s, stories, pairs)),
    Benchmark("dinov2", ("accuracy.py",), dinov2),
    Benchmark("weight_only", ("weight_only.py",), stories, seeds=False),
    Benchmark("decoding", ("decoding.py",), stories, seeds=False),
    Benchmark("latency", ("latency.py",), lambda s: ["--work", str(measured_files(s))], seeds=False),
    Benchmark("attention", ("attention.py",), attention, seeds=False),
    Benchmark("compile_time", ("compile_time.py", "stages"), lambda s: [], seeds=False),
    Benchmark("clipping", ("compile_time.py", "clipping"),
              lambda s: [*some(s, lambda s: ["--images", s.images()[1]], sentences), "--threads", "1"], seeds=False),
    *(Benchmark(f"peer_{name}", (f"peers/{name}.py",), peer(name)) for name in PEERS),
)


def run_all(chosen: Sequence[Benchmark], sources: Sources, seeds: Sequence[int], folder: Path, keep: bool) -> int:
    """Run benchmarks one after the other; one that fails does not keep others from running.

    Returns:
        How many failed.
    """
    said: list[str] = []
    failed = 0
    for benchmark in chosen:
        try:
            command = benchmark.command(sources, seeds, folder, keep)
        except Absent as reason:
            said.append(f"{benchmark.name}: left out, {reason}")
            continue
        print(f"\n=== {benchmark.name}\n", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            failed += 1
            said.append(f"{benchmark.name}: failed with exit code {code}; the same command goes on from its last row")
    print("\n" + "\n".join(said or ["all measured"]), flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of all data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build/tables",
                        help="folder for unpacked data and prepared models (%(default)s)")
    parser.add_argument("--peers", type=Path, help="folder of the peers' checkouts")
    parser.add_argument("--download", action="store_true", help="let pip fetch the sentence encoder")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[each.name for each in BENCHMARKS],
                        help="these benchmarks alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="of the JSON files (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="use stored rows of other commits, machines and settings")
    parser.add_argument("--dirty", action="store_true", help="measure a work tree with changes")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    options = parser.parse_args(arguments)
    chosen = [each for each in BENCHMARKS if not options.only or each.name in options.only]
    if options.list:
        print("\n".join(f"{each.name:16s} {' '.join(each.script)}" for each in chosen))
        return 0
    if (changed := results.changes()) and not options.dirty:
        print("the work tree has changes that no commit holds: commit them, or measure with --dirty\n"
              + changed.split("\ndiff ")[0], file=sys.stderr)
        return 2
    images = None if options.data else find_data()
    data = options.data or (images.parent if images else None)
    sources = Sources(data.resolve() if data else None, options.work.resolve(), options.peers, options.download)
    return 1 if run_all(chosen, sources, options.seeds, options.folder, options.keep) else 0


if __name__ == "__main__":
    sys.exit(main())
