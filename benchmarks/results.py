"""Rows of a benchmark in a JSON file, each with where it comes from; mean and spread over seeds.

A row has a key (model, section, method...), a seed, the settings that it was measured with, and values. The file lists
commits, versions and machines once. A stored row is used again where commit, versions, machine and settings are those
of this run, so a benchmark that was interrupted goes on; any other row is measured anew and, once the first row of this
run is saved, dropped. `keep` uses rows whatever they come from. A commit of null is one that was not recorded.

    results = Results(path, {"samples": 1024})
    results.measure(("ViT", "RepQuant W4A4"), seed, lambda: {"top1": 84.9})
    cell(results.rows()["ViT", "RepQuant W4A4"], "top1")     # "84.90 ± 0.05"
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE / "results"
PACKAGES = ("torch", "onnxruntime", "onnx", "openvino", "nncf", "numpy", "timm", "transformers")
# what decides how fast integer products are
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
Key = tuple[str, ...]
Values = dict[str, Any]


# ---- provenance ------------------------------------------------------------------------------------------------------


def git(*arguments: str, folder: Path = HERE) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def changes(folder: Path = HERE) -> str:
    """What of the work tree is not committed, results aside: names of files, differences, and what new files hold.
    Empty where the tree is clean.
    """
    paths = ("--", ":(top)", f":(top,exclude)benchmarks/{FOLDER.name}")
    names = git("status", "--porcelain", *paths, folder=folder)
    if not names:
        return ""
    new = (git("ls-files", "--others", "--exclude-standard", "--full-name", *paths, folder=folder) or "").splitlines()
    top = Path(git("rev-parse", "--show-toplevel", folder=folder) or folder)
    held = [hashlib.sha256((top / name).read_bytes()).hexdigest() for name in new if (top / name).is_file()]
    return "\n".join([names, git("diff", "HEAD", *paths, folder=folder) or "", *held])


def commit(folder: Path = HERE) -> str | None:
    """The commit that is checked out, with a digest of what differs from it; None where git does not tell."""
    head, changed = git("rev-parse", "HEAD", folder=folder), changes(folder)
    if head is None or not changed:
        return head
    return f"{head}+{hashlib.sha256(changed.encode()).hexdigest()[:8]}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The CPU, its instruction sets and cores. It is not named."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    info = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    flags = info.get("flags", info.get("Features", "")).split()
    return {"cpu": info.get("model name") or platform.processor() or platform.machine(),
            "instructions": [name for name in INSTRUCTIONS if name in flags],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.system()}


def provenance() -> dict[str, Any]:
    """Commit, versions and machine."""
    return {"commit": commit(), "versions": versions(), "machine": machine()}


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was measured once.

    Attributes:
        values: figures by name.
        settings: that they depend on, beside the key and the seed.
        about: commit, versions and machine.
    """

    values: Values
    settings: Mapping[str, Any]
    about: Mapping[str, Any]


def load(path: Path) -> dict[tuple[Key, int], Row]:
    """The rows of a file, by key and seed; none where there is no file.

    Raises:
        SystemExit: the file is not one of these.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            (tuple(row["key"]), row["seed"]): Row(row["values"], row["settings"], stored["about"][row["about"]])
            for row in stored["rows"]
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SystemExit(f"{path} does not hold rows of a benchmark ({error!r}): remove it") from error


def save(path: Path, rows: Mapping[tuple[Key, int], Row]) -> None:
    """Write all rows; the file is the old one or the new one, never a part."""
    about: list[Mapping[str, Any]] = []
    for row in rows.values():
        if row.about not in about:
            about.append(row.about)
    lines = [
        json.dumps({"key": key, "seed": seed, "about": about.index(row.about), "settings": row.settings,
                    "values": row.values})
        for (key, seed), row in rows.items()
    ]
    text = '{"about": ' + json.dumps(about, indent=1) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def by_key(stored: Mapping[tuple[Key, int], Row]) -> dict[Key, dict[int, Values]]:
    """Values by key and seed."""
    rows: dict[Key, dict[int, Values]] = {}
    for (key, seed), row in stored.items():
        rows.setdefault(key, {})[seed] = row.values
    return rows


@dataclass
class Results:
    """The rows of one benchmark, in a file.

    Attributes:
        path: of the file; None keeps nothing.
        settings: that this run measures with.
        keep: use stored rows whatever they come from.
        about: commit, versions and machine of this run.
    """

    path: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep: bool = False
    about: Mapping[str, Any] = field(default_factory=provenance)

    def __post_init__(self) -> None:
        self.settings, self.about = (json.loads(json.dumps(each)) for each in (self.settings, self.about))
        self.found: dict[tuple[Key, int], Row] = self._stored()

    def measure(self, key: Sequence[str], seed: int, run: Callable[[], Values]) -> tuple[Values, bool]:
        """The values of a row, and whether they are new: stored ones, or those of `run`, which are saved at once."""
        place = (tuple(key), seed)
        stored = self.found.get(place)
        if stored is not None and (self.keep or stored.settings == self.settings):
            return stored.values, False
        values = json.loads(json.dumps(run()))
        # another process may have saved rows
        self.found = {**self._stored(), **self.found, place: Row(values, self.settings, self.about)}
        if self.path is not None:
            save(self.path, self.found)
        return values, True

    def rows(self) -> dict[Key, dict[int, Values]]:
        """Values by key and seed, in the order in which they were first measured."""
        return by_key(self.found)

    def _stored(self) -> dict[tuple[Key, int], Row]:
        rows = load(self.path) if self.path is not None else {}
        if self.keep:
            return rows
        known = self.about.get("commit") is not None  # what is unknown is not the same
        return {place: row for place, row in rows.items() if known and row.about == self.about}


# ---- mean and spread -------------------------------------------------------------------------------------------------


def mean_and_spread(seeds: Mapping[int, Values], name: str) -> tuple[float, float | None]:
    """Mean of a value over the seeds, and its sample standard deviation; None where there is one seed."""
    values = [float(each[name]) for each in seeds.values()]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cell(seeds: Mapping[int, Values] | None, name: str, digits: int = 2) -> str:
    """`84.85`, or `84.85 ± 0.12` over several seeds; what no seed changes has no spread. Empty where nothing was
    measured.
    """
    if not seeds or any(name not in each for each in seeds.values()):
        return ""
    mean, spread = mean_and_spread(seeds, name)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if spread else f"{mean:.{digits}f}"


def accuracy_table(rows: Mapping[Key, Mapping[int, Values]], models: Sequence[str] = ()) -> str:
    """Markdown: a row for each label, a pair of columns for each model; keys are (model, label)."""
    models = models or list(dict.fromkeys(name for name, _ in rows))
    lines = ["| | " + " | ".join(f"{name} top-1 % | {name} SQNR dB" for name in models) + " |",
             "|---|" + "---:|---:|" * len(models)]
    for label in dict.fromkeys(label for _, label in rows):
        found = [rows.get((name, label)) for name in models]
        cells = [f" {cell(r, 'top1')} | {'' if label == 'float' else cell(r, 'sqnr_db')} " for r in found]
        lines.append(f"| {label} |" + "|".join(cells) + "|")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser, file: str | None, *, seeds: bool = True) -> None:
    """The options that all benchmarks share; `file` is the default name in `benchmarks/results`, if there is one."""
    parser.add_argument("--results", type=Path, default=FOLDER / file if file else None,
                        help="JSON file of all rows" + (" (%(default)s)" if file else ""))
    parser.add_argument("--keep", action="store_true", help="use stored rows of other commits, machines and settings")
    if seeds:
        parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration data and of compiling")
