"""One place that shows progress on long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
enabled = True


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterable[T]:
    """Iterate with a bar on stderr where that is a terminal and `enabled` is true; the bar goes away at the end."""
    return _shown(iterable, total, description) if enabled and sys.stderr.isatty() else iterable


def _shown(iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # stdout belongs to results: what is printed there meanwhile must not be moved to stderr
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield from bar.track(iterable, total=total, description=description)
