"""Text from a file, made safe for a terminal, a log and an error message."""

from __future__ import annotations

import unicodedata


def printable(text: str, longest: int | None = None) -> str:
    r"""Text on one line that moves no cursor, changes no color, turns no direction and hides nothing.

    Control characters (newlines and ESC among them), format characters (bidirectional overrides, zero-width ones), line
    and paragraph separators, lone surrogates and private or unassigned code points appear as Python would write them.
    All else stays.

    Args:
        longest: characters of `text` that are shown at most, all where None; what is left out is counted.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    cut = len(text) if longest is None else longest
    shown = text[:cut]
    if not shown.isprintable():  # which is so of almost all text
        shown = "".join(map(_escaped, shown))
    return shown if len(text) <= cut else f"{shown}... ({len(text) - cut} more characters)"


def _escaped(character: str) -> str:
    plain = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if plain else character.encode("unicode_escape").decode("ascii")
