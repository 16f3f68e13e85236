"""One place that shows progress on long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
enabled = True


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterable[T]:
    """Iterate with a bar on stderr where that is a terminal and `enabled` is true."""
    return tqdm(iterable, total=total, desc=description, file=sys.stderr, disable=not (enabled and sys.stderr.isatty()), leave=False)
