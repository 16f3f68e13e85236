"""Layers of which only some rows are kept: the experts of a mixture, each of which computes every token.

What is kept of a layer's output, another layer's fills elsewhere (`where(mine, output, others)`, a row for each token).
Told by dataflow alone. Such a layer's weight is rounded for the rows that are kept, not for those it computes in vain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.fx import Node

from repquant_fx.passes.base import aten, is_tensor, shape_of
from repquant_fx.passes.match_sites import Site
from repquant_fx.quantizers.counted import picked


@dataclass(frozen=True)
class Part:
    """Layers that read one site and whose rows are the same.

    Attributes:
        key: of their moments.
        kept: gives which rows are kept, boolean (rows, 1); None for all.
    """

    key: str
    consumers: tuple[Node, ...]
    kept: Node | None = None


def kept_rows(consumer: Node) -> Node | None:
    """What says which rows of a Linear's output are kept; None where all are."""
    if consumer.target is not aten.linear.default or len(consumer.users) != 1:
        return None
    (user,) = consumer.users
    if user.target is not aten.where.self or user.args[1] is not consumer:
        return None
    kept = cast(Node, user.args[0])
    rows = shape_of(consumer)[:-1]
    if not kept < consumer:  # it would not be known yet
        return None
    return kept if is_tensor(kept) and len(rows) == 1 and tuple(shape_of(kept)) == (*rows, 1) else None


def parts(site: Site) -> list[Part]:
    """The layers of a site: those of which all rows are kept together, each other by itself."""
    kept = {consumer: kept_rows(consumer) for consumer in site.consumers}
    whole = tuple(consumer for consumer, which in kept.items() if which is None)
    routed = [Part(f"{site.name} of {consumer.name}", (consumer,), which)
              for consumer, which in kept.items() if which is not None]
    return [*([Part(site.name, whole)] if whole else []), *routed]


def rows_of(rows: Tensor, counted: Tensor | None, kept: Tensor | None) -> Tensor:
    """Of some rows those that count (see `counted.which_rows`) and are kept."""
    if kept is None:
        return picked(rows, counted)
    return rows[kept[:, 0] if counted is None else kept[:, 0] & counted]
