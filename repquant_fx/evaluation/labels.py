"""Names of a model's classes, as a configuration of transformers stores them (`id2label`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MOST_BYTES = 16 << 20  # of a configuration


def labels_beside(path: Path) -> dict[int, str] | None:
    """The classes that a `config.json` beside a file names; None where there is none."""
    try:
        config = path.parent / "config.json"
        if config.stat().st_size > _MOST_BYTES:
            return None
        return read_labels(json.loads(config.read_text(encoding="utf-8")).get("id2label"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def read_labels(value: Any) -> dict[int, str] | None:
    """Names of classes by number, as a configuration of transformers stores them; None for anything else."""
    try:
        return {int(number): str(name) for number, name in value.items()} or None
    except (AttributeError, TypeError, ValueError):
        return None
