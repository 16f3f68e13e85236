"""Tables of positions that a constructor fills in Python or numpy, outside of what the meta device can measure."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from repquant_fx.errors import ModelFileError

_MOST = 1 << 26  # numbers; the largest of public models have an eighth
_POSITIONS = re.compile(r"(max_)?(\w+_)?(positions?|position_embeddings|n_ctx|context_length|prediction_length)")
_WIDTHS = re.compile(r"(\w+_)?(dim|d_model|hidden_size|width|embed)")


def check_tables(cls: Any, described: Any, where: str) -> None:
    """Refuse positions times width beyond what any table has, for a class whose module computes with numpy.

    Args:
        cls: of the model.
        described: its configuration as JSON.
        where: the file, for the message.

    Raises:
        ModelFileError: the table would be too large.
    """
    if not hasattr(sys.modules.get(cls.__module__), "np"):
        return
    positions = max((value for key, value in _integers(described) if _POSITIONS.fullmatch(key)), default=0)
    width = max((value for key, value in _integers(described) if _WIDTHS.fullmatch(key)), default=1)
    if positions * max(width, 1) > _MOST:
        raise ModelFileError(
            f"{where} asks for a table of {positions} positions of {width} numbers each, more than {_MOST} in all"
        )


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _integers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, key)
    elif isinstance(value, int):
        yield key, value
