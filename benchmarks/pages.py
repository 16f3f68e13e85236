"""Writes measured figures into the documents, so that text and numbers cannot part.

    python benchmarks/pages.py            # write
    python benchmarks/pages.py --check    # exit 1, and say where, if a document differs from the results

A document marks what comes from `benchmarks/results/NAME.json` by comments that no reader sees:

    <!-- measured accuracy: methods -->        a table, on lines of its own, and where it was measured
    ...
    <!-- end -->
    of <!-- measured accuracy: ViT; methods; RepQuant W4A4; top1 -->84.82<!-- end --> %

Behind the name stand, for a table, its section if there are several, and for one figure the key of the row and the name
of the value, with `:DIGITS` where two do not fit. What is not in the results any more is an error: a document must not
keep a figure whose row is gone.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accuracy
import attention
import compile_time
import decoding
import language_accuracy
import latency
import mixed_precision
import reconstruction
import results
import targets
import weight_only
from results import Key, Row, Values, cell

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/**/*.md")
MARK = re.compile(r"<!-- measured (\w+)(?:: ([^>]*?))? -->(.*?)<!-- end -->", re.DOTALL)
Rows = dict[Key, dict[int, Values]]


def whole(table: Callable[[Rows], str]) -> Callable[[Rows], dict[str, str]]:
    """A benchmark of one table."""
    return lambda rows: {"": table(rows)}


def beside_float(rows: Rows, bits: str) -> str:
    """Markdown: how often each method of one width answers as the float model does, its noise, accuracy and size."""
    lines = ["| | same answer as float | SQNR of the logits | top-1 | MB |", "|---|---:|---:|---:|---:|"]
    for (_, section, label), seeds in rows.items():
        if section == "methods" and (label == "float" or label.endswith(bits)):
            cells = [cell(seeds, name, 1) + unit if label != "float" or name == "top1" else ""
                     for name, unit in (("agreement", " %"), ("sqnr_db", " dB"), ("top1", " %"), ("megabytes", ""))]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: Mapping[str, Callable[[Rows], dict[str, str]]] = {
    "accuracy": accuracy.sections,
    "dinov2": lambda rows: {**accuracy.sections(rows), "methods, W8A8": beside_float(rows, "W8A8")},
    "data_free": whole(results.accuracy_table),
    "language": whole(language_accuracy.tables),
    "mixed_precision": whole(mixed_precision.table),
    "reconstruction": whole(reconstruction.table),
    "latency": whole(latency.table),
    "compile_time": whole(compile_time.stages_table),
    "clipping": whole(compile_time.clipping_table),
    "attention": whole(attention.table),
    "weight_only": weight_only.tables,
    "decoding": decoding.tables,
    "targets": lambda rows: {"parity": targets.parity_table(rows), "saturation": targets.saturation_table(rows)},
}


class Gone(Exception):
    """A document shows what the results do not hold."""


def written(text: str, folder: Path = results.FOLDER) -> str:
    """The document with the figures of the results in their places.

    Raises:
        Gone: a table, a row or a value is not in them.
    """
    return MARK.sub(lambda mark: _filled(mark, folder), text)


def _filled(mark: re.Match[str], folder: Path) -> str:
    name, place, content = mark[1], (mark[2] or "").strip(), mark[3]
    stored = results.load(folder / f"{name}.json")
    if not stored:
        raise Gone(f"{name}.json holds no rows")
    new = _table(name, place, stored) if content.startswith("\n") else _figure(name, place, results.by_key(stored))
    return mark[0][:mark.start(3) - mark.start()] + new + "<!-- end -->"


def _table(name: str, section: str, stored: Mapping[tuple[Key, int], Row]) -> str:
    if name not in TABLES:
        raise Gone(f"{name} has no table; there are {', '.join(TABLES)}")
    found = TABLES[name](results.by_key(stored))
    if section not in found:
        raise Gone(f"{name} has no section {section!r}; there are {', '.join(map(repr, found))}")
    return f"\n\n{found[section]}\n\n{provenance(stored)}\n\n"


def _figure(name: str, place: str, rows: Rows) -> str:
    *key, last = (part.strip() for part in place.split(";"))
    value, _, digits = last.partition(":")
    found = cell(rows.get(tuple(key)), value, int(digits or 2))
    if not found:
        raise Gone(f"{name} has no row {tuple(key)} with a value {value!r}")
    return found


def provenance(stored: Mapping[tuple[Key, int], Row]) -> str:
    """Where and with what rows were measured, in one line."""
    seeds = sorted({seed for _, seed in stored})
    found = []
    for about in {repr(row.about): row.about for row in stored.values()}.values():
        found.append("; ".join(part for part in (_commit(about), _machine(about["machine"]),
                                                 _versions(about["versions"])) if part))
    kinds = "Seed" if len(seeds) == 1 else "Seeds"
    return textwrap.fill(f"*{kinds} {', '.join(map(str, seeds))}; {' / '.join(found)}.*", 120)


def _commit(about: Mapping[str, Any]) -> str:
    return f"commit {about['commit'][:9]}" if about["commit"] else "commit not recorded"


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    return f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])})"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name in results.PACKAGES)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, folder: Path = results.FOLDER) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say what would change")
    options = parser.parse_args(arguments)
    differ = 0
    for page in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        try:
            new = written(text, folder)
        except Gone as reason:
            raise SystemExit(f"{page.relative_to(root)}: {reason}") from reason
        if new != text:
            differ += 1
            print(page.relative_to(root), "differs from the results: run benchmarks/pages.py" if options.check else "")
            if not options.check:
                page.write_text(new, encoding="utf-8")
    return int(options.check and differ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
