"""Reading documents: fenced blocks of code, and the commands in a shell block."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+?) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_EXIT = re.compile(r"#.*\bexit code (\d+)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` says why it is not run, `line` is its first line of code."""

    language: str
    code: str
    line: int
    why: str | None


@dataclass(frozen=True)
class Command:
    """One simple command; `exit_code` is what a comment behind it promises, 0 without one; `output` the file that
    stdout goes to.
    """

    words: tuple[str, ...]
    exit_code: int = 0
    output: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order. `<!-- not run: reason -->` above one says that it is only parsed."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1, match["why"])


def commands(script: str) -> Iterator[Command]:
    """The simple commands of a shell script; pipes, lists and substitutions are taken apart."""
    for line, words in _lines(script.replace("\\\n", " ")):
        promised = _EXIT.search(line)
        exit_code = int(promised[1]) if promised else 0
        for inner in _SUBSTITUTION.findall(line):  # commands within words
            yield from commands(inner)
        simple: list[str] = []
        output: str | None = None
        for index, word in enumerate([*words, ";"]):
            if set(word) <= set("|&;"):
                if simple:
                    yield Command(tuple(simple), exit_code, output)
                simple, output = [], None
            elif index and words[index - 1] == ">":
                if simple[-1] == "2":  # of stderr
                    simple.pop()
                else:
                    output = word
            elif word != ">":
                simple.append(word)


def _lines(script: str) -> Iterator[tuple[str, list[str]]]:
    """Lines and their words; a quoted word may go over several lines."""
    pending = ""
    for line in script.splitlines():
        pending += line + "\n"
        lexer = shlex.shlex(
            re.sub(rf'"?{_SUBSTITUTION.pattern}"?', "SUBSTITUTED", pending), posix=True, punctuation_chars="|&;<>()"
        )
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation is open
            continue
        yield pending, words
        pending = ""
    assert not pending, f"a quotation is not closed: {pending[:80]}"
