"""The table of limits on the security page says what the code does: each row is written from the constants here."""

from __future__ import annotations

import math
import os

from documents import ROOT

from repquant_fx import limits, recipe_reading
from repquant_fx.calibration import arrays, checks, images, text
from repquant_fx.cli import common
from repquant_fx.exporters import data_file, reading
from repquant_fx.frontends import (
    architectures,
    directory,
    huggingface,
    processor,
    pt2_archive,
    pt2_expressions,
    pt2_rehearsal,
    pt2_screen,
    rebuilt,
    rehearsal,
    screening,
    sentencepiece,
    state,
    tables,
    tokenizer_growth,
)
from repquant_fx.security import channel, confinement, names, schema, supervisor


def n(number: float) -> str:
    return f"{number:,}"


def size(count: int) -> str:
    """Bytes in the largest unit that measures them, a limit of one byte less like the one beside it."""
    count += count % 2
    unit = min(3, (count.bit_length() - 1) // 10)
    assert count % (1 << 10 * unit) == 0
    return f"{count >> 10 * unit} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def rows() -> list[tuple[str, str, str]]:
    """What is limited, the limit, and the file where it stands ("" for the file above). Long because it is a table."""
    screen, expressions, growth = pt2_screen, pt2_expressions, tokenizer_growth
    code = "repquant_fx/"
    return [
        ("**any model**: layers", n(limits._MOST_MODULES), code + "limits.py"),
        ("all weights together; one tensor", "memory", ""),
        ("length of a name", f"{n(names._LONGEST)} characters", code + "security/names.py"),
        ("paths to the layers of a pickled module that share layers", n(names._MOST_WAYS), ""),
        (
            "a number in an architecture (`--arch`, `timm:`)",
            n(architectures._LARGEST),
            code + "frontends/architectures.py",
        ),
        (
            "**zip archive**: what it unpacks to",
            f"{size(limits._BOMB_BYTES)}, or {limits._BOMB_RATIO} times its size if that is more",
            code + "limits.py",
        ),
        ("**pickle** without its tensors", size(rehearsal._MOST_BYTES), code + "frontends/rehearsal.py"),
        ("classes and functions that it names", n(rehearsal._MOST_GLOBALS), ""),
        (
            "objects in nested tuples; levels; objects in keys",
            f"{n(rehearsal._MOST_NESTED)}; {rehearsal._DEEPEST}; {n(rehearsal._MOST_HASHED)}",
            "",
        ),
        (
            "plain data of one module: values; levels; bits of an integer",
            f"{n(state._MOST_ITEMS)}; {state._DEEPEST}; {state._MOST_BITS}",
            code + "frontends/state.py",
        ),
        ("a tensor that claims more than it stores", size(state._SMALL_BYTES), ""),
        (
            "configuration of a pickled model: values; levels",
            f"{n(rebuilt._MOST_ITEMS)}; {rebuilt._DEEPEST}",
            code + "frontends/rebuilt.py",
        ),
        (
            "**`.pt2`**: records; a JSON document",
            f"{n(pt2_archive._MOST_RECORDS)}; {size(pt2_archive._MOST_JSON)}",
            code + "frontends/pt2_archive.py",
        ),
        ("a tensor that repeats what is stored", f"{n(pt2_archive._SMALL)} elements", ""),
        (
            "nodes; values; levels; characters of a text",
            f"{n(screen._MOST_NODES)}; {n(screen._MOST_VALUES)}; {screen._DEEPEST}; {n(screen._LONGEST_TEXT)}",
            code + "frontends/pt2_screen.py",
        ),
        (
            "symbolic expressions: all; one",
            f"{n(screen._MOST_EXPRESSIONS)}; {n(expressions._MOST_TEXT)} characters",
            "",
        ),
        (
            "in one: parts; terms when expanded; branches; powers; an exponent",
            f"{expressions._MOST_NODES}; {n(expressions._MOST_TERMS)}; {expressions._MOST_BRANCHING}; "
            f"{expressions._MOST_POWERS}; {expressions._LARGEST_EXPONENT}",
            code + "frontends/pt2_expressions.py",
        ),
        ("an intermediate result", "memory", code + "frontends/pt2_rehearsal.py"),
        ("factor of an interpolation", "{:g} to {:,g}".format(*pt2_rehearsal._SCALES), ""),
        (
            "**directory**: descriptions; bytes of one",
            f"{n(directory._MOST_FILES)}; {size(directory._MOST_BYTES)}",
            code + "frontends/directory.py",
        ),
        (
            "bytes of a configuration; of a processor",
            f"{size(huggingface._MOST_BYTES)}; {size(processor._MOST_BYTES)}",
            code + "frontends/huggingface.py",
        ),
        (
            "in it: levels; layers; other counts; entries of all lists",
            f"{screening._DEEPEST}; {n(screening._MOST_LAYERS)}; {n(screening._MOST_OTHERS)}; "
            f"{n(screening._MOST_REPEATED)}",
            code + "frontends/screening.py",
        ),
        (
            "weights that a configuration describes",
            f"twice those of the files and {n(limits._SPARE)} more",
            code + "limits.py",
        ),
        ("a table of positions", f"{n(tables._MOST)} numbers", code + "frontends/tables.py"),
        (
            "**tokenizer**: growth of a text; rules; characters of a rule; tokens added",
            f"{n(growth._MOST_GROWTH)} times; {growth._MOST_STEPS}; {n(growth._MOST_LETTERS)}; {n(growth._MOST_ADDED)}",
            code + "frontends/tokenizer_growth.py",
        ),
        (
            "SentencePiece: bytes; pieces; bytes of one piece; of another field",
            f"{size(sentencepiece._MOST_BYTES)}; {n(sentencepiece._MOST_PIECES)}; {n(sentencepiece._LONGEST_PIECE)}; "
            f"{n(sentencepiece._LONGEST_TEXT)}",
            code + "frontends/sentencepiece.py",
        ),
        (
            "**`.onnx`**: bytes; names and messages; characters of a name",
            f"{size(reading._MOST_BYTES)}; {n(reading._MOST_FIELDS)}; {n(reading._LONGEST_NAME)}",
            "exporters/reading.py",
        ),
        (
            "what functions expand to; how deep they call each other",
            f"{n(reading._MOST_NODES)} nodes, {size(reading._MOST_COPIED)}; {reading._DEEPEST_CALLS}",
            "",
        ),
        (
            "data files beside it; matrices in one; bytes of its name",
            f"1; memory; {data_file._LONGEST_NAME}",
            "exporters/data_file.py",
        ),
        (
            "**metadata, report**: bytes; levels",
            f"{size(schema.LONGEST)}; {schema.DEEPEST}",
            code + "security/schema.py",
        ),
        ("**recipe**: bytes; levels", f"{size(recipe_reading.MOST_BYTES)}; {recipe_reading._DEEPEST}",
         code + "recipe_reading.py"),
        (
            "**image**: pixels; the longer side over the shorter",
            f"{n(images._MOST_PIXELS)}; {images._LONGEST}",
            code + "calibration/images.py",
        ),
        (
            "**text**; characters of a line",
            f"1/{text._BYTES_OF_A_LETTER} of memory; {n(text.LONGEST_LINE)}",
            code + "calibration/text.py",
        ),
        ("**`.npz`**: the arrays that are read", f"1/{arrays._SHARE} of memory", code + "calibration/arrays.py"),
        (
            "values of calibration data (masks excepted)",
            f"10^{round(math.log10(checks._LARGEST))}",
            code + "calibration/checks.py",
        ),
        (
            "**options**: samples, batch, tokens; trials, probes; threads",
            f"{n(common.MOST_SAMPLES)}; {n(common.MOST_TRIES)}; 64, or 8 per CPU if that is more",
            code + "cli/common.py",
        ),
        (
            "**time** for loading, and for capturing",
            f"{channel.LOAD_SECONDS:g} s each (`--load-timeout`)",
            code + "security/channel.py",
        ),
        ("to end after a signal", f"{supervisor.GRACE:g} s", code + "security/supervisor.py"),
        ("**address space**", f"memory plus {size(confinement.SLACK)}", code + "security/confinement.py"),
    ]


def test_the_table_says_what_the_code_does() -> None:
    page = (ROOT / "docs" / "guide" / "security.md").read_text(encoding="utf-8")
    table = page.partition("## Limits")[2].partition("| what | limit | in |\n|---|---|---|\n")[2].partition("\n\n")[0]
    wanted = [f"| {what} | {limit} | {f'`{file}` ' if file else ''}|" for what, limit, file in rows()]
    assert table.splitlines() == wanted
    assert all((ROOT / file).is_file() for _, _, file in rows() if file)
    assert common.MOST_TOKENS == common.MOST_SAMPLES and common.MOST_THREADS == max(64, 8 * (os.cpu_count() or 1))
