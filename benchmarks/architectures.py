"""Which architectures compile: every transformer of timm and every text, image and sound model of transformers, at a
small size, with random weights, at W8A8.

    python benchmarks/architectures.py                      # hours; the same command goes on where it was interrupted
    python benchmarks/architectures.py --limit 100          # so many of each library, of as many files as possible
    python benchmarks/architectures.py --only timm:swin_tiny_patch4_window7_224 transformers:bert
    python benchmarks/architectures.py --page docs/architectures.md --limit 0   # the page from the rows that there are

Each model is compiled in a process of its own with a time limit (`--seconds`). One that torch.export turns into the
same operators as one that compiled, sizes aside, is not compiled again: its row names the other (`graphs.py`). Rows are
kept in `benchmarks/results/architectures.json`; `--keep` uses those of other commits (`results.py`), and `--again
OUTCOME` tries anew what had that outcome.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import re
import resource
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from graphs import Inputs, fingerprint
from results import Key, Results, Row, Values, add_options
from shrink import NotSmall
from shrink_timm import small_timm, transformers_of_timm
from shrink_transformers import architectures_of_transformers, small_transformers
from torch import nn

DONE = "code for code"
NOT_CAPTURED = "not captured"
NOT_SMALL = "no small model"
OUTCOMES = {
    DONE: "compiled; ONNX Runtime gives the same codes as the FX reference at every quantizer",
    "disagrees": "compiled, but the file disagrees with its reference: nothing would be written",
    "refused": "refused with one line",
    "failed": "an internal error, a bug",
    "time limit": "not done within the limit of CPU seconds",
    NOT_CAPTURED: "torch.export gives up on it",
    NOT_SMALL: "no small model could be built and run by this script",
}
ABOUT = ("Printed by `benchmarks/architectures.py`: architectures at a small size, random weights, compiled at W8A8",
         "without GPTQ and correction, and checked under ONNX Runtime. Where not all were tried, it is a sample.")
PLAIN = {"gptq": False, "correction": False, "clipping": "none", "activations": "minmax", "weights": "minmax",
         "softmax_scale": "percentile"}
ROWS = 6  # calibration samples, as many as are held back, and some more
_LONGEST = 200  # letters of a reason
_ASLEEP = 20  # times the limit: what waits so long waits for ever


def outcome(library: str, name: str, compiled: Mapping[str, str] = MappingProxyType({})) -> Values:
    """Compile one architecture in this process, unless its graph is one that compiled: names by fingerprint."""
    warnings.simplefilter("ignore")
    try:
        model, inputs = small_timm(name) if library == "timm" else small_transformers(name)
    except NotSmall as error:
        return {"outcome": NOT_SMALL, "reason": shortened(str(error))}
    graph = fingerprint(model, inputs)
    if graph in compiled:
        return {"outcome": DONE, "reason": "", "as": compiled[graph]}
    return {**_compiled(model, inputs), "graph": graph}


def _compiled(model: nn.Module, inputs: Inputs) -> Values:
    from repquant_fx import InputError, ParityError, Recipe, compile
    from repquant_fx.errors import ExportError

    try:
        if isinstance(inputs, torch.Tensor):
            compile(model, more(inputs), Recipe(**PLAIN), batch_size=2)
        else:
            compile(model, {key: more(value) for key, value in inputs.items()}, Recipe(**PLAIN), example_inputs=inputs,
                    batch_size=2)
    except ExportError as error:
        return {"outcome": NOT_CAPTURED, "reason": shortened(str(error))}
    except ParityError as error:
        return {"outcome": "disagrees", "reason": shortened(str(error))}
    except InputError as error:
        return {"outcome": "refused", "reason": shortened(str(error))}
    except Exception as error:
        return {"outcome": "failed", "reason": shortened(f"{type(error).__name__}: {error}")}
    return {"outcome": DONE, "reason": ""}


def more(example: torch.Tensor) -> torch.Tensor:
    """Calibration rows like the two of an example."""
    if example.is_floating_point():
        return torch.randn(ROWS, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    return torch.cat([example.roll(i, -1) for i in range(ROWS // 2)])


def shortened(text: str) -> str:
    line = re.sub(r"/\S*/site-packages/", "", " ".join(text.split()))  # where a library lies is no reason
    return line if len(line) <= _LONGEST else line[:_LONGEST - 3] + "..."


def in_a_child(library: str, name: str, seconds: float, compiled: Mapping[str, str]) -> Values:
    """`outcome` in a forked process that is ended after so many CPU seconds, which do not depend on what else runs."""
    context, late = multiprocessing.get_context("fork"), {"outcome": "time limit", "reason": f"{seconds:g} s"}
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
        sender.send(outcome(library, name, compiled))

    child = context.Process(target=work)
    begin = time.perf_counter()
    child.start()
    sender.close()
    try:
        values = receiver.recv() if receiver.poll(_ASLEEP * seconds) else late
    except EOFError:
        child.join()
        killed = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        values = late if killed else {"outcome": "failed", "reason": f"it ended with the code {child.exitcode}"}
    child.kill()
    child.join()
    return {**values, "seconds": round(time.perf_counter() - begin, 1)}


def rounds(names: Mapping[str, str], limit: int | None = None) -> list[list[str]]:
    """One name of each file, then a second one of each, and so on; of a first round that is too long, ones spread
    evenly.
    """
    groups: dict[str, list[str]] = {}
    for name, group in names.items():
        groups.setdefault(group, []).append(name)
    depth = max(map(len, groups.values()), default=0)
    found = [[group[i] for group in groups.values() if i < len(group)] for i in range(depth)]
    if limit is not None and found and limit < len(found[0]):
        return [found[0][::-(-len(found[0]) // max(1, limit))][:limit]]
    left = itertools.accumulate((len(each) for each in found), initial=0)
    return [each if limit is None else each[:max(0, limit - before)] for each, before in zip(found, left)]


def ordered(known: Mapping[str, Mapping[str, str]], limit: int | None = None) -> list[tuple[str, str]]:
    """Libraries and names, round by round, the libraries in turns."""
    each = [[[(library, name) for name in names] for names in rounds(files, limit)] for library, files in known.items()]
    return [place for turn in itertools.zip_longest(*each, fillvalue=[]) for row in itertools.zip_longest(*turn)
            for place in row if place]


# ---- the page --------------------------------------------------------------------------------------------------------


def page(rows: Mapping[tuple[Key, int], Row]) -> str:
    """The page of the documents: counts, then what did not compile, then what did."""
    found = {key: row.values for (key, _), row in rows.items()}
    known = {name: count for row in rows.values() for name, count in row.settings.get("known", {}).items()}
    libraries = list(dict.fromkeys(library for library, _ in found))
    lines = ["# Architectures", "", *ABOUT, "",
             "| | " + " | ".join(libraries) + " |", "|---|" + "---:|" * len(libraries)]
    counts = {library: [v["outcome"] for (each, _), v in found.items() if each == library] for library in libraries}
    lines.append("| known | " + " | ".join(str(known.get(library, "")) for library in libraries) + " |")
    lines.append("| tried | " + " | ".join(str(len(counts[library])) for library in libraries) + " |")
    for name, about in OUTCOMES.items():
        lines.append(f"| {name}: {about} | " + " | ".join(str(counts[lib].count(name)) for lib in libraries) + " |")
        if name == DONE:
            same = [sum("as" in v for (each, _), v in found.items() if each == lib) for lib in libraries]
            lines.append("| of these, not compiled because torch.export gives the operators of one that was, sizes "
                         "aside | " + " | ".join(map(str, same)) + " |")
    shares = []
    for library in libraries:
        captured = [each for each in counts[library] if each not in (NOT_CAPTURED, NOT_SMALL)]
        shares.append(f"{100 * captured.count(DONE) / len(captured):.1f} %" if captured else "")
    lines += ["| **code for code, of all that torch.export captures** | " + " | ".join(shares) + " |", "",
              "## What did not compile", "", "| architecture | outcome | reason |", "|---|---|---|"]
    lines += [f"| {library} `{name}` | {v['outcome']} | {_cell(v['reason'])} |"
              for (library, name), v in sorted(found.items()) if v["outcome"] != DONE]
    lines += ["", "## What compiled"]
    for library in libraries:
        done = {name: v.get("as") for (each, name), v in found.items() if each == library and v["outcome"] == DONE}
        lines += ["", f"**{library}**: " + ", ".join(f"`{name}`" + (f" (as `{other}`)" if other else "")
                                                     for name, other in sorted(done.items())) + "."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that is no markup and ends no cell."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""


def run(results: Results, names: Sequence[tuple[str, str]], seconds: float, again: Sequence[str] = ()) -> None:
    """Compile all of them, one after the other, and say what became of each.

    Args:
        again: outcomes of stored rows that are tried anew.
    """
    for index, (library, name) in enumerate(names, 1):
        stored = results.found.get(((library, name), 0))
        if stored is not None and stored.values["outcome"] in again:
            results.found.pop(((library, name), 0))
        compiled = {row.values["graph"]: key[1] for (key, _), row in results.found.items()
                    if row.values["outcome"] == DONE and row.values.get("graph")}
        values, new = results.measure((library, name), 0,
                                      lambda: in_a_child(library, name, seconds, compiled))  # noqa: B023
        if new:
            print(f"{index}/{len(names)} {library}:{name}: {values['outcome']}  "
                  f"{values.get('as') or values['reason']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="so many of each library")
    parser.add_argument("--only", nargs="+", metavar="LIBRARY:NAME", help="these alone")
    parser.add_argument("--again", nargs="+", default=[], metavar="OUTCOME",
                        help="try stored rows of these outcomes anew")
    parser.add_argument("--seconds", type=float, default=120, help="of the CPU for each (default 120)")
    parser.add_argument("--page", type=Path, help="write the page of the documents, too")
    add_options(parser, "architectures.json", seeds=False)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import repquant_fx.compiler  # noqa: F401 - once, before processes are forked

    known = {"timm": transformers_of_timm(), "transformers": architectures_of_transformers()}
    counts = {library: len(names) for library, names in known.items()}
    results = Results(options.results, {"known": counts}, options.keep)
    if options.only:
        run(results, [(library, name) for library, _, name in (each.partition(":") for each in options.only)],
            options.seconds, options.again)
    else:
        run(results, ordered(known, options.limit), options.seconds, options.again)
    text = page(results.found)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
